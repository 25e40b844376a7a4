"""Sizes that ZeRO works with: the engine sets them, the memory model counts with them."""

PERSISTENT_ELEMENTS = 100_000
"""ZeRO-3 keeps smaller parameters whole: gathering them costs more than it saves."""
ALL_REDUCE_ELEMENTS = 500_000_000
"""Where DeepSpeed reduces whole gradients at the step (stage 0, BF16_Optimizer), it copies up to this many
into one tensor."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""ZeRO-3 applies the optimizer to this many elements at once."""


def bucket_elements(gpu: bool) -> int:
    """Elements of a bucket of gradients or gathered parameters. 25 M (100 MB in fp32) lose no bandwidth over
    gloo; NVLink and InfiniBand are filled by 200 M. DeepSpeed's default of 5e8 allocates a 2 GB buffer per
    rank."""
    return 200_000_000 if gpu else 25_000_000


def overlaps(gpu: bool, stage: int) -> bool:
    """True where gradients are reduced (and ZeRO-3's parameters fetched) on a stream of their own while the
    backward goes on, out of a second bucket. A CPU overlaps nothing, and stages 0 and 1 reduce once, at the
    step."""
    return gpu and stage >= 2

"""Sizes of ZeRO's buffers. The engine sets them, and the memory model counts with them."""

PERSISTENT_ELEMENTS = 100_000
"""ZeRO-3 does not partition parameters up to this size: gathering them would cost more than it saves."""
ALL_REDUCE_ELEMENTS = 500_000_000
"""Gradient elements that DeepSpeed copies into one tensor when it reduces whole gradients at the step (stage
0 and BF16_Optimizer)."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""Elements that ZeRO-3 applies the optimizer to in one call."""


def bucket_elements(gpu: bool) -> int:
    """Elements of a bucket of gradients or gathered parameters.

    25 M (100 MB in fp32) lose no bandwidth over gloo, 200 M fill NVLink and InfiniBand. DeepSpeed's default
    of 5e8 allocates a 2 GB buffer per rank."""
    return 200_000_000 if gpu else 25_000_000


def overlaps(gpu: bool, stage: int) -> bool:
    """True if gradients are reduced (and ZeRO-3's parameters fetched) on a separate stream during the
    backward, from a second bucket. A CPU overlaps nothing. Stages 0 and 1 reduce once, at the step."""
    return gpu and stage >= 2

"""Speed of the two decoders of the transformers engine: `python benchmarks/decoding.py [--threads N]`.

Random Llama models decode 16 prompts of 16 to 96 tokens, 8 samples each of at most 160 tokens; one token in
forty ends a sequence, so lengths are ragged (mean 40). Times are CPU seconds of the best of three rounds, so
that other work on the machine counts little. Both decoders make the same tokens.

Two shared cores with AVX-512, torch 2.13, transformers 5.19, fp32, one thread, 5.0 and 5.3 thousand tokens:

    model      rows     static             continuous
    0.3 M        16     0.96 s  5264 tok/s     1.20 s  4191 tok/s
    0.3 M        64     0.64 s  7874 tok/s     1.07 s  4713 tok/s
    17.8 M       16    12.76 s   412 tok/s    12.72 s   414 tok/s
    17.8 M       64    10.07 s   523 tok/s    12.20 s   431 tok/s

On a CPU the refilled static batch is as quick or quicker: SDPA over pages computes every row against the keys
of all rows and masks most of the result. `rollouts.batching=auto` chooses by the device.
"""

import argparse
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from orchestrator.core.rollouts import Sampling
from orchestrator.models.tiny import build
from orchestrator.recipe.schema import TinyModel
from orchestrator.rollout.engines.engine import Request
from orchestrator.rollout.engines.padded_decoder import StaticDecoder
from orchestrator.rollout.engines.paged_decoder import ContinuousDecoder
from orchestrator.rollout.engines.sampling import sample_seed

VOCABULARY, ROOM, SAMPLES, PROMPTS, ROUNDS = 2048, 160, 8, 16, 3
EOS = range(2, 2 + VOCABULARY // 40)
SIZES = ((64, 2), (512, 6))
"""(hidden size, layers) of each model."""


def requests() -> list[Request]:
    """The same ragged prompts every time."""
    random = np.random.default_rng(0)
    prompts = [random.integers(EOS.stop, VOCABULARY, length) for length in random.integers(16, 97, PROMPTS)]
    return [
        Request(p, tuple(sample_seed(0, i, 0, k, 0) for k in range(SAMPLES)), ROOM)
        for i, p in enumerate(prompts)
    ]


def main() -> None:
    """Prints one line for each size, number of rows and decoder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    for hidden, layers in SIZES:
        heads = max(4, hidden // 64)
        sizes = {"hidden_size": hidden, "layers": layers, "heads": heads, "vocab_size": VOCABULARY}
        cfg = TinyModel.model_validate(sizes)
        model = build(cfg, 0, AutoModelForCausalLM).eval().requires_grad_(False)
        name = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
        for rows in (16, 64):
            for kind in (StaticDecoder, ContinuousDecoder):
                decoder, seconds, tokens = kind(model, EOS, rows, str), float("inf"), 0
                for _ in range(ROUNDS):
                    start = time.process_time()
                    groups = decoder.generate(requests(), Sampling(SAMPLES, ROOM))
                    seconds = min(seconds, time.process_time() - start)
                    tokens = sum(len(c.ids) for completions in groups for c in completions)
                print(
                    f"{name:>6} {rows:>3} rows  {kind.__name__:<18} {tokens} tokens {seconds:6.2f} s "
                    f"{tokens / seconds:7.0f} tokens/s",
                    flush=True,
                )


if __name__ == "__main__":
    main()

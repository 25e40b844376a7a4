"""Decodes with transformers' continuous batching: a paged cache, rows of any length, no padding.

    requests --submit: prefill each prompt once, fork it for its samples--> the manager's thread
        ^                                                                      |  one step for all rows,
        |                                                                      v  TokenSampler draws
        +-- samples end, their pages are free for other requests <-- one token per row

On a CPU the padded decoder is mostly faster (benchmarks/decoding.py).

The manager draws from one global generator, so a row's tokens would depend on the rows beside it. Therefore
it decodes greedily here, and the scores that it sees are 1 at the token that TokenSampler drew with the
sample's own noise, and 0 elsewhere. TokenSampler also keeps each token's log-prob, since the manager would
report that of its own scores.
"""

import gc
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState

from orchestrator.core.batches import Finish
from orchestrator.core.errors import Exit, OrchestratorError
from orchestrator.core.rollouts import Completion, Sampling
from orchestrator.models.noise import words
from orchestrator.rollout.engines.engine import Request
from orchestrator.rollout.engines.padded_decoder import StopCriteria, as_completion, on_host
from orchestrator.rollout.engines.sampling import draw

PAGE_TOKENS = 32
PREFILL_TOKENS = 256
"""Fewest tokens of a step, so that few steps prefill a prompt; SDPA's mask grows with its square."""
POLL_S = 1.0
"""Seconds between checks of the manager's thread while no sample ends."""


class ContinuousBatchingFailed(OrchestratorError):
    """transformers' continuous batching cannot decode with this model or this release."""

    exit_code = Exit.CONFIG


@dataclass(slots=True)
class _Sample:
    """One sample that is being decoded."""

    name: str
    """Id of the manager's request."""
    seed: tuple[int, int]
    """The two 32-bit words of its seed."""
    position: int
    """Tokens that the seed drew before this request."""
    limit: int
    """Tokens that it may draw."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    finish: Finish | None = None

    def completion(self) -> Completion:
        return as_completion(self.ids, self.logprobs, self.kept, self.finish)


class TokenSampler(ContinuousBatchingLogitsProcessor):
    """Draws the tokens of each step, in the manager's thread."""

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, sampling: Sampling, stops: StopCriteria, cancel: Callable[[str], None]) -> None:
        self.sampling, self.stops, self.cancel = sampling, stops, cancel
        self.samples: dict[str, _Sample] = {}
        """All samples by name."""
        self.step: list[_Sample] = []
        """Samples whose tokens the next scores are for."""
        self.ended: queue.SimpleQueue[_Sample] = queue.SimpleQueue()
        """Samples in the order in which they end."""

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """Sets `step`. The manager wants a number per row, which is not used."""
        self.step = [self.samples[r.state.request_id] for r in requests_with_new_token]
        return torch.zeros(len(self.step), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """scores: Float[R, V], the first len(step) of them real -> Float[R, V] with 1 at each row's token."""
        chosen, rows = torch.zeros_like(scores), self.step
        if rows:
            seeds = torch.tensor([s.seed for s in rows], device=scores.device)
            positions = torch.tensor([s.position + len(s.ids) for s in rows], device=scores.device)
            drawn = draw(scores[: len(rows)], seeds, positions, self.sampling)
            chosen[: len(rows)].scatter_(1, drawn.tokens[:, None], 1.0)
            for sample, token, logprob, kept in zip(rows, *on_host(drawn), strict=True):
                self._append(sample, token, logprob, kept)
        return chosen

    def _append(self, sample: _Sample, token: int, logprob: float, kept: list[float]) -> None:
        sample.ids.append(token)
        sample.logprobs.append(logprob)
        sample.kept.extend(kept)
        sample.finish = self.stops.finish(sample.ids, sample.limit, self.sampling.stop)
        if sample.finish is None:
            return
        if token not in self.stops.eos and len(sample.ids) < sample.limit:
            self.cancel(sample.name)  # it ended with a stop text, which the manager does not look for
        self.ended.put(sample)


class ContinuousDecoder:
    """Decodes requests with one model in this process, with the same tokens as StaticDecoder.

    The manager and its pages exist during one `generate`: nothing computed with old weights can be read with
    new ones, the memory is free while the learner works, and the model has its own attention back.
    """

    def __init__(
        self, model: Any, eos: Sequence[int], rows: int, decode: Callable[[Sequence[int]], str]
    ) -> None:
        """`rows` sequences are decoded together; `eos` are the tokens that end a sequence.

        ContinuousBatchingFailed if the model cannot use a paged cache.
        """
        self.model, self.rows, self.stops = model, rows, StopCriteria(frozenset(eos), decode)
        _settings(rows, 1)  # another release of transformers may not know these settings
        # Without this error BLOOM's log-probs would be off by 0.02 nat (it never sees the pages) and Gemma
        # 2's by 0.005 (no cap).
        if not model._can_set_attn_implementation() or model.config._attn_implementation == "eager":
            raise ContinuousBatchingFailed(
                f"{type(model).__name__} cannot decode with continuous batching",
                why="it computes attention in its own way, which the paged cache does not support",
                fix="set rollouts.batching=static",
            )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Completion, ...]]:
        """The completions of each request, in order, each with the eos or stop text that ended it."""
        if not requests:
            return []
        submitted: list[list[_Sample]] = []
        waiting, running = deque(requests), 0
        with self._manager(requests, sampling) as (manager, sampler):
            while waiting or running:
                while waiting and (not running or running + len(waiting[0].seeds) <= self.rows):
                    request = waiting.popleft()
                    submitted.append(self._submit(manager, sampler, request, len(submitted)))
                    running += len(request.seeds)
                self._wait(manager, sampler)
                running -= 1
        return [tuple(sample.completion() for sample in samples) for samples in submitted]

    def _submit(self, manager: Any, sampler: TokenSampler, request: Request, number: int) -> list[_Sample]:
        """Queues a request.

        The manager prefills the prompt but its last token, then forks: every sample draws its first token in
        its own row. A prompt of one token has nothing to prefill before the fork.
        """
        forked = len(request.prompt) > 1
        first, others = str(number), range(len(request.seeds) - 1)
        names = [first, *(f"{first}__child#{i}" if forked else f"{first}.{i}" for i in others)]
        samples = [
            _Sample(name, words(seed), request.position, request.tokens_left)
            for name, seed in zip(names, request.seeds, strict=True)
        ]
        sampler.samples |= {sample.name: sample for sample in samples}
        manager.num_return_sequences = len(samples) if forked else 1
        for name in names[:1] if forked else names:
            manager.add_request(
                request.prompt.tolist(),
                request_id=name,
                max_new_tokens=request.tokens_left,
                eos_token_id=sorted(self.stops.eos),
            )
        return samples

    def _wait(self, manager: Any, sampler: TokenSampler) -> _Sample:
        """Waits for the next sample that ends; ContinuousBatchingFailed if the manager's thread is dead."""
        while True:
            try:
                return sampler.ended.get(timeout=POLL_S)
            except queue.Empty:
                if not manager.is_running():
                    error = manager.background_thread_status.fatal_error
                    raise ContinuousBatchingFailed(
                        f"transformers' continuous batching does not decode with {type(self.model).__name__}",
                        why=f"{type(error).__name__}: {error}",
                        fix="set rollouts.batching=static",
                    ) from error

    @contextmanager
    def _manager(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[Any, TokenSampler]]:
        """A running manager whose pages hold `rows` of the longest sequences, and its TokenSampler."""
        self.model.eval()
        attention = self.model.config._attn_implementation
        greedy = GenerationConfig(do_sample=False, eos_token_id=sorted(self.stops.eos), pad_token_id=0)
        manager = self.model.init_continuous_batching(
            generation_config=greedy, continuous_batching_config=self._pages(requests)
        )
        sampler = TokenSampler(sampling, self.stops, manager.cancel_request)
        manager.logit_processor.logits_processor.append(sampler)
        manager.logit_processor.tensors_required += 1
        manager.logit_processor.do_processing = True
        # stop() and destroy() collect garbage: 0.2 s each over all objects of torch and transformers
        gc.freeze()
        try:
            manager.start()
            yield manager, sampler
        finally:
            manager.stop(block=True, hard_stop=True)  # nothing has to be flushed, except after an error
            manager.destroy()
            if self.model.config._attn_implementation != attention:
                self.model.set_attn_implementation(attention)
            gc.unfreeze()

    def _pages(self, requests: Sequence[Request]) -> ContinuousBatchingConfig:
        """Sizes that hold these requests."""
        rows = max(self.rows, max(len(r.seeds) for r in requests))
        return _settings(rows, max(len(r.prompt) + r.tokens_left for r in requests))


def _settings(rows: int, longest: int) -> ContinuousBatchingConfig:
    """Sizes for `rows` rows of `longest` tokens; the default would take 60 % of the memory.

    No page is shared between requests, so that none is read that was computed with earlier weights.
    """
    try:
        return ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=rows * (-(-longest // PAGE_TOKENS) + 1),
            max_batch_tokens=max(PREFILL_TOKENS, rows),
            max_requests_per_batch=rows,
            max_blocks_per_request=0,
            safety_margin=0.0,
            allow_block_sharing=False,
            auto_switch_to_flash=False,  # another kernel than the learner's widens the gap of log-probs
            use_async_batching=False,
            use_cuda_graph=False,
        )
    except TypeError as error:
        raise ContinuousBatchingFailed(
            f"transformers {transformers.__version__}: this program needs another continuous batching",
            why=str(error),
            fix='pip install "transformers>=5.19", or set rollouts.batching=static',
        ) from error

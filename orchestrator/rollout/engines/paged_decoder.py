"""The transformers engine with transformers' continuous batching: a paged cache in which rows of any length
decode together without padding. On a CPU static.py is mostly quicker (benchmarks/decoding.py);
`rollouts.batching: measured` times both.

    requests --submit: a prompt is prefilled once and forked for its samples--> the manager's thread: one step for all rows
        ^                                                                           |
        +------- samples end, their pages are free for other requests <-- `Drawer`: draws one token a row as
        static.py does

The manager would draw from one global generator, so what a row gets would depend on the rows beside it. Here
it is told to decode greedily, and the scores it sees have 1 at the token that the Drawer chose by the
sample's own noise and 0 elsewhere. The Drawer also keeps each token's log-prob: the manager would report the
one of its own scores.
"""

import gc
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar

import numpy as np
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
from orchestrator.rollout.engines.padded_decoder import StaticDecoder, StopCriteria, as_completion, on_host
from orchestrator.rollout.engines.sampling import draw

PAGE_TOKENS = 32
PREFILL_TOKENS = 256
"""Tokens of a step at least, so that prompts are prefilled in few of them; its square grows with the mask of
SDPA."""
GAP, GAP_HALF = 1e-3, 0.05
"""Nat per token by which log-probs of the two decoders may differ in fp32, and in half precision: more is
another model."""
POLL_S = 1.0
"""How often the manager's thread is looked at while no sample ends."""


class ContinuousBatchingFailed(OrchestratorError):
    """transformers' continuous batching cannot decode with this model, or not here."""

    exit_code = Exit.CONFIG


@dataclass(slots=True)
class _Sample:
    """One sample under way. name: of the manager's request; words: of its seed; position: tokens drawn before
    this request."""

    name: str
    words: tuple[int, int]
    position: int
    room: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    finish: Finish | None = None

    def completion(self) -> Completion:
        return as_completion(self.ids, self.logprobs, self.kept, self.finish)


class TokenSampler(ContinuousBatchingLogitsProcessor):
    """Draws the tokens of a step in the manager's thread. ended: samples in the order in which they end."""

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, sampling: Sampling, ends: StopCriteria, cancel: Callable[[str], None]) -> None:
        self.sampling, self.ends, self.cancel = sampling, ends, cancel
        self.samples: dict[str, _Sample] = {}
        self.step: list[_Sample] = []
        self.ended: queue.SimpleQueue[_Sample] = queue.SimpleQueue()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """Notes whose tokens the next scores are for; the manager wants a number per row, which nobody reads."""
        self.step = [self.samples[r.state.request_id] for r in requests_with_new_token]
        return torch.zeros(len(self.step), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """scores: Float[R, V], the first len(step) of them real -> Float[R, V] with 1 at each row's token."""
        chosen, rows = torch.zeros_like(scores), self.step
        if rows:
            seeds = torch.tensor([s.words for s in rows], device=scores.device)
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
        sample.finish = self.ends.finish(sample.ids, sample.room, self.sampling.stop)
        if sample.finish is None:
            return
        if (
            token not in self.ends.eos and len(sample.ids) < sample.room
        ):  # a stop text, of which the manager knows nothing
            self.cancel(sample.name)
        self.ended.put(sample)


class ContinuousDecoder:
    """Decodes requests with one model in this process, as StaticDecoder does and with its results. rows:
    sequences decoded together; eos: tokens that end a sequence. ContinuousBatchingFailed where the model does
    not take a paged cache.

    The manager and its pages live for one `generate`: nothing computed with old weights can be read with new
    ones, the memory is free while the learner works, and the model has its own attention back.
    """

    def __init__(
        self, model: Any, eos: Sequence[int], rows: int, decode: Callable[[Sequence[int]], str]
    ) -> None:
        self.model, self.rows, self.ends = model, rows, StopCriteria(frozenset(eos), decode)
        _settings(rows, 1)  # another release of transformers may not know these settings
        own = not model._can_set_attn_implementation() or model.config._attn_implementation == "eager"
        # in silence, BLOOM's log-probs would be off by 0.02 nat (it never sees the pages), Gemma 2's by 0.005
        # (no cap)
        if own:
            raise ContinuousBatchingFailed(
                f"{type(model).__name__} cannot decode with continuous batching",
                why="it computes attention in a way of its own, which the paged cache does not know",
                fix="set rollouts.batching=static",
            )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Completion, ...]]:
        """The completions of each request, in order. A stop text or eos is the last token of its completion."""
        if not requests:
            return []
        made: list[list[_Sample]] = []
        waiting, running = deque(requests), 0
        with self._manager(requests, sampling) as (manager, drawer):
            while waiting or running:
                while waiting and (not running or running + len(waiting[0].seeds) <= self.rows):
                    request = waiting.popleft()
                    made.append(self._submit(manager, drawer, request, len(made)))
                    running += len(request.seeds)
                self._wait(manager, drawer)
                running -= 1
        return [tuple(sample.completion() for sample in samples) for samples in made]

    def _submit(self, manager: Any, drawer: TokenSampler, request: Request, number: int) -> list[_Sample]:
        """Queues a request. The manager prefills all of the prompt but its last token and forks the rest:
        every sample draws its first token in a row of its own. A prompt of one token has nothing to prefill
        before the fork."""
        forked = len(request.prompt) > 1
        first, others = str(number), range(len(request.seeds) - 1)
        names = [first, *(f"{first}__child#{i}" if forked else f"{first}.{i}" for i in others)]
        samples = [
            _Sample(name, words(seed), request.position, request.room)
            for name, seed in zip(names, request.seeds, strict=True)
        ]
        drawer.samples |= {sample.name: sample for sample in samples}
        manager.num_return_sequences = len(samples) if forked else 1
        for name in names[:1] if forked else names:
            manager.add_request(
                request.prompt.tolist(),
                request_id=name,
                max_new_tokens=request.room,
                eos_token_id=sorted(self.ends.eos),
            )
        return samples

    def _wait(self, manager: Any, drawer: TokenSampler) -> _Sample:
        """The next sample that ends; ContinuousBatchingFailed where the manager's thread is dead."""
        while True:
            try:
                return drawer.ended.get(timeout=POLL_S)
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
        """A running manager whose pages hold `rows` of the longest sequences, and its Drawer."""
        self.model.eval()
        attention = self.model.config._attn_implementation
        greedy = GenerationConfig(do_sample=False, eos_token_id=sorted(self.ends.eos), pad_token_id=0)
        manager = self.model.init_continuous_batching(
            generation_config=greedy, continuous_batching_config=self._pages(requests)
        )
        drawer = TokenSampler(sampling, self.ends, manager.cancel_request)
        manager.logit_processor.logits_processor.append(drawer)
        manager.logit_processor.tensors_required += 1
        manager.logit_processor.do_processing = True
        # stop() and destroy() collect garbage: 0.2 s each time over all that torch and transformers hold
        gc.freeze()
        try:
            manager.start()
            yield manager, drawer
        finally:
            manager.stop(block=True, hard_stop=True)  # nothing is left to flush, but after an error
            manager.destroy()
            if self.model.config._attn_implementation != attention:
                self.model.set_attn_implementation(attention)
            gc.unfreeze()

    def _pages(self, requests: Sequence[Request]) -> ContinuousBatchingConfig:
        """Sizes from the requests."""
        return _settings(
            max(self.rows, max(len(r.seeds) for r in requests)), max(len(r.prompt) + r.room for r in requests)
        )


def _settings(rows: int, longest: int) -> ContinuousBatchingConfig:
    """Sizes for so many rows of so many tokens: the default would take 60 % of the memory. No page is shared
    between requests: an unfinished weight update must not find one made with the weights before."""
    try:
        return ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=rows * (-(-longest // PAGE_TOKENS) + 1),
            max_batch_tokens=max(PREFILL_TOKENS, rows),
            max_requests_per_batch=rows,
            max_blocks_per_request=0,
            safety_margin=0.0,
            allow_block_sharing=False,
            auto_switch_to_flash=False,  # another kernel than the learner's would add to the gap of log-probs
            use_async_batching=False,
            use_cuda_graph=False,
        )
    except TypeError as error:
        raise ContinuousBatchingFailed(
            f"transformers {transformers.__version__} has another continuous batching than this program was "
            "written for",
            why=str(error),
            fix='pip install "transformers>=5.19", or set rollouts.batching=static',
        ) from error


class MeasuredDecoder:
    """Decodes by whichever of the two is quicker here. The first requests, twice as many rows as are decoded
    together, go through both; what is returned for them is the static decoder's. note: takes a line that says
    what was found."""

    def __init__(
        self, static: StaticDecoder, continuous: ContinuousDecoder, note: Callable[[str], None]
    ) -> None:
        self.static, self.continuous, self.note = static, continuous, note
        self.chosen: StaticDecoder | ContinuousDecoder | None = None

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Completion, ...]]:
        """As the decoders do."""
        if self.chosen is not None or not requests:
            return (self.chosen or self.static).generate(requests, sampling)
        total = np.cumsum([len(r.seeds) for r in requests])
        few = int(np.searchsorted(total, 2 * self.static.rows)) + 1
        done = self._measure(requests[:few], sampling)
        return done + self.generate(requests[few:], sampling)

    def _measure(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Completion, ...]]:
        """The completions of `requests`; sets `chosen`."""
        expected, static_s = _timed(self.static, requests, sampling)
        try:
            found, continuous_s = _timed(self.continuous, requests, sampling)
        except ContinuousBatchingFailed as error:
            self.chosen = self.static
            self.note(f"rollouts.batching=measured: static, as continuous batching failed\n{error}")
            return expected
        gap, half = logprob_gap(expected, found), self.continuous.model.dtype != torch.float32
        quicker = self.continuous if continuous_s < static_s else self.static
        self.chosen = quicker if gap <= (GAP_HALF if half else GAP) else self.static
        name = "continuous" if self.chosen is self.continuous else "static"
        rows = sum(len(r.seeds) for r in requests)
        times = f"static {static_s:.2f} s, continuous {continuous_s:.2f} s"
        self.note(
            f"rollouts.batching=measured: {name} ({rows} samples: {times}, log-probs differ by {gap:.1e})"
        )
        return expected


def logprob_gap(one: Sequence[tuple[Completion, ...]], other: Sequence[tuple[Completion, ...]]) -> float:
    """Mean |difference| of log-probs in nat over the tokens up to where two decoders part; infinite where
    none agree."""
    gaps: list[float] = []
    for a, b in zip(chain.from_iterable(one), chain.from_iterable(other), strict=True):
        length = min(len(a.ids), len(b.ids))
        equal = int((a.ids[:length] == b.ids[:length]).cumprod().sum())
        gaps.extend(np.abs(a.logprobs[:equal] - b.logprobs[:equal]).tolist())
    return float(np.mean(gaps)) if gaps else float("inf")


def _timed(
    decoder: StaticDecoder | ContinuousDecoder, requests: Sequence[Request], sampling: Sampling
) -> tuple[list[tuple[Completion, ...]], float]:
    """What it makes of the requests, and the seconds. The first tokens that a process decodes are slow, so
    some go before."""
    decoder.generate([replace(requests[0], room=min(2, requests[0].room))], sampling)
    start = time.perf_counter()
    return decoder.generate(requests, sampling), time.perf_counter() - start

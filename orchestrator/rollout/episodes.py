"""Episodes: one completion of a prompt, or a conversation with an environment, turn by turn.

    prompt --sample--> completion                                              (no environment)

    reset(row) -> messages --template--> prompt --sample--> completion --step--> messages
                                           ^                                        |
                                           +---------------- template --------------+   … until done

Only the model's own tokens are in the loss. They are kept as they were sampled: later turns are appended to
those very tokens, which are never tokenized again.
"""

import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.core.batches import Finish, Ints
from orchestrator.core.errors import ConfigError, DataError
from orchestrator.core.rollouts import Completion, Prompt, Rollout, RolloutGroup, Sampling
from orchestrator.data.template import render
from orchestrator.rollout.engines.engine import Decoder, Request
from orchestrator.rollout.engines.sampling import sample_seed
from orchestrator.rollout.environment import Environment, Factory, Messages, Turn

_ANSWER = "\x02answer\x03"
"""Stands for the assistant's text when the template is asked what follows it."""


class EpisodeRunner:
    """Samples groups with one decoder and, if the recipe names one, an environment."""

    def __init__(
        self, decoder: Decoder, tokenizer: Any, environment: Factory | None, max_turns: int, retries: int = 0
    ) -> None:
        """`retries` is how often an episode is begun again whose environment raised an exception."""
        self.decoder, self.tokenizer, self.environment = decoder, tokenizer, environment
        self.max_turns, self.retries = max_turns, retries

    def run(
        self, work: Sequence[tuple[int, Prompt]], sampling: Sampling, version: int
    ) -> tuple[RolloutGroup, ...]:
        """A group for each (draw, prompt), in order."""
        if self.environment is None:
            return self._single(work, sampling, version)
        return self._episodes(work, sampling, version, self.environment)

    def _single(
        self, work: Sequence[tuple[int, Prompt]], sampling: Sampling, version: int
    ) -> tuple[RolloutGroup, ...]:
        requests = [
            Request(p.ids, _seeds(sampling, p.id, draw, version), sampling.max_new_tokens) for draw, p in work
        ]
        groups = []
        for (draw, prompt), completions in zip(work, self.decoder.generate(requests, sampling), strict=True):
            rollouts = tuple(
                Rollout(
                    k,
                    version,
                    c.ids,
                    np.ones(len(c.ids), np.bool_),
                    c.logprobs,
                    c.finish,
                    self._shown(prompt.text, c.ids),
                    kept=c.kept,
                )
                for k, c in enumerate(completions)
            )
            groups.append(RolloutGroup(prompt, draw, rollouts))
        return tuple(groups)

    def _episodes(
        self, work: Sequence[tuple[int, Prompt]], sampling: Sampling, version: int, environment: Factory
    ) -> tuple[RolloutGroup, ...]:
        """All episodes, turn by turn.

        An episode whose environment failed is begun again with a new environment, from the same seed. If it
        still fails after all retries it becomes a rollout without a reward, which costs its group, not the
        run.
        """
        groups = [
            [
                _Episode(k, seed, p, sampling.max_new_tokens)
                for k, seed in enumerate(_seeds(sampling, p.id, draw, version))
            ]
            for draw, p in work
        ]
        for retries_left in reversed(range(self.retries + 1)):
            for (_, prompt), group in zip(work, groups, strict=True):
                self._begin(prompt, group, environment)
            self._play([e for group in groups for e in group], sampling)
            if not any(e.failure for group in groups for e in group):
                break
            groups = [
                [e.restarted(sampling.max_new_tokens) if e.failure and retries_left else e for e in group]
                for group in groups
            ]
        return tuple(
            RolloutGroup(_begun_prompt(group, prompt), draw, tuple(e.rollout(version) for e in group))
            for (draw, prompt), group in zip(work, groups, strict=True)
        )

    def _play(self, episodes: Sequence["_Episode"], sampling: Sampling) -> None:
        """Samples turns of the model until every episode is over."""
        for _ in range(self.max_turns):
            active = [e for e in episodes if not e.over]
            if not active:
                break
            requests = [Request(e.tokens(), (e.seed,), e.tokens_left, e.tokens_drawn) for e in active]
            for episode, (completion,) in zip(active, self.decoder.generate(requests, sampling), strict=True):
                self._advance(episode, completion)

    def _begin(self, prompt: Prompt, group: Sequence["_Episode"], environment: Factory) -> None:
        """Makes and resets an environment for each episode of a prompt that has none yet."""
        for episode in group:
            if episode.environment is not None or episode.over:
                continue
            with episode.guarded():
                episode.environment = environment()
                row = deepcopy({**prompt.columns, "prompt": prompt.text})  # the environment may change it
                messages = episode.environment.reset(row)
                if not messages:
                    raise ValueError("reset gave no messages")
                episode.messages = _checked_messages(messages, "reset")
            if episode.failure:
                continue
            first = next(e for e in group if e.messages)
            if episode.messages != first.messages:
                raise DataError(
                    f"{prompt.where}: the environment began two episodes of one row differently",
                    fix="make reset a function of the row",
                )
            ids = (
                first.prompt.ids
                if first is not episode
                else np.array(self._render(episode.messages, prompt), np.int64)
            )
            episode.prompt = replace(prompt, ids=ids, text=episode.messages)

    def _advance(self, episode: "_Episode", completion: Completion) -> None:
        """Adds the model's turn, steps the environment, adds its messages if the model has a turn left."""
        episode.add(completion.ids, loss_mask=True)
        episode.logprobs.append(completion.logprobs)
        if completion.kept is not None:
            episode.kept.append(completion.kept)
        text = self._text(completion.ids)
        episode.conversation.append({"role": "assistant", "content": text})
        episode.tokens_drawn += len(completion.ids)
        episode.turns += 1
        turn = Turn(done=True)
        with episode.guarded():
            assert episode.environment is not None
            turn = _checked_turn(episode.environment.step(text))
        if episode.failure:
            return
        episode.reward += turn.reward
        episode.conversation += turn.messages
        suffix = [] if turn.done else self._suffix(turn.messages, completion, episode.prompt)
        if turn.done:
            episode.finish = completion.finish
        elif (
            completion.finish == "length"
            or len(suffix) >= episode.tokens_left
            or episode.turns >= self.max_turns
        ):
            episode.finish = "length"
        else:
            episode.add(np.array(suffix, np.int64), loss_mask=False)

    def _suffix(self, messages: Messages, completion: Completion, prompt: Prompt) -> list[int]:
        """Tokens between the model's turn and its next, as the template writes them."""
        before = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}]
        text = render(
            self.tokenizer, [*before, *messages], prompt, tokenize=False, add_generation_prompt=True
        )
        _, answer, tail = text.rpartition(_ANSWER)
        if not answer:
            raise ConfigError(
                f"{prompt.where}: the chat template changes the assistant's text",
                fix="use another model.chat_template",
            )
        last = int(completion.ids[-1])
        # Both are checked, since a turn may end with another token than eos: Llama's is <|eot_id|>.
        if last == self.tokenizer.eos_token_id or last in self.tokenizer.added_tokens_decoder:
            tail = tail.removeprefix(self.tokenizer.decode([last]))  # the model wrote it itself
        return list(self.tokenizer(text=tail, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Messages, prompt: Prompt) -> list[int]:
        if not self.tokenizer.chat_template:
            what = f"{prompt.where}: an environment uses messages, but the tokenizer has no chat template"
            raise ConfigError(what, fix="set model.chat_template")
        return list(render(self.tokenizer, messages, prompt, add_generation_prompt=True)["input_ids"])

    def _text(self, ids: Ints) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def _shown(self, prompt: Any, ids: Ints) -> Any:
        """A completion as TRL passes it to reward functions: text if the prompt is text, else messages."""
        text = self._text(ids)
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


@dataclass(slots=True)
class _Episode:
    """An episode that is being played."""

    sample: int
    seed: int
    prompt: Prompt
    """The row's prompt; once the episode has begun, the conversation that reset gave."""
    tokens_left: int
    """Tokens that may still follow."""
    environment: Environment | None = None
    messages: Messages = field(default_factory=list)
    """The conversation that reset gave."""
    ids: list[Ints] = field(default_factory=list)
    """Tokens after the prompt, turn by turn."""
    loss_mask: list[np.ndarray] = field(default_factory=list)
    """Bool, True for the model's own tokens, turn by turn."""
    logprobs: list[np.ndarray] = field(default_factory=list)
    """Float, of the model's own tokens."""
    kept: list[np.ndarray] = field(default_factory=list)
    """Float, as Completion.kept."""
    conversation: Messages = field(default_factory=list)
    """Messages after the prompt."""
    tokens_drawn: int = 0
    """Tokens that the seed has drawn."""
    turns: int = 0
    reward: float = 0.0
    finish: Finish | None = None
    failure: str | None = None
    """What the environment raised."""

    @property
    def over(self) -> bool:
        return self.finish is not None or self.failure is not None

    def restarted(self, tokens_left: int) -> "_Episode":
        """The same episode, not begun."""
        return _Episode(self.sample, self.seed, self.prompt, tokens_left)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Records what the user's code raises as the failure; its traceback goes to the actor's log."""
        try:
            yield
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self.failure = _describe(error)

    def tokens(self) -> Ints:
        return np.concatenate([self.prompt.ids, *self.ids])

    def add(self, ids: Ints, *, loss_mask: bool) -> None:
        self.ids.append(ids)
        self.loss_mask.append(np.full(len(ids), loss_mask, np.bool_))
        self.tokens_left -= len(ids)

    def rollout(self, version: int) -> Rollout:
        return Rollout(
            sample=self.sample,
            version=version,
            ids=np.concatenate([np.zeros(0, np.int64), *self.ids]),
            loss_mask=np.concatenate([np.zeros(0, np.bool_), *self.loss_mask]),
            logprobs=np.concatenate([np.zeros(0, np.float32), *self.logprobs]),
            finish=self.finish or "length",
            completion=self.conversation,
            turns=self.turns,
            environment_reward=None if self.failure else self.reward,
            failure=self.failure,
            kept=np.concatenate(self.kept) if self.kept else None,
        )


def _begun_prompt(group: Sequence[_Episode], prompt: Prompt) -> Prompt:
    """The prompt as the environment began it; the row's if no episode has begun."""
    return next((e.prompt for e in group if e.messages), prompt)


def _checked_turn(turn: Any) -> Turn:
    """The turn with a finite reward; TypeError or ValueError if it is not one."""
    if not all(hasattr(turn, name) for name in ("messages", "done", "reward")):
        raise TypeError(f"step returned a {type(turn).__name__}, not a Turn")
    if turn.reward is None:
        raise ValueError("step gave the reward None, not a number")
    reward = float(turn.reward)
    if not math.isfinite(reward):
        raise ValueError(f"step gave the reward {reward}")
    return Turn(_checked_messages(turn.messages, "step"), bool(turn.done), reward)


def _checked_messages(messages: Any, verb: str) -> Messages:
    if not isinstance(messages, list | tuple) or not all(
        isinstance(m, Mapping) and "role" in m for m in messages
    ):
        raise TypeError(f"{verb} gave {str(messages)[:60]!r} for messages, not a list of {{role, content}}")
    return deepcopy([dict(m) for m in messages])


def _describe(error: BaseException) -> str:
    """An error of the environment with its place, on one line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}{where}{': ' + message if message else ''}"


def _seeds(sampling: Sampling, prompt: int, draw: int, version: int) -> tuple[int, ...]:
    return tuple(sample_seed(sampling.seed, prompt, draw, k, version) for k in range(sampling.samples))

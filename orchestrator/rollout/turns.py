"""Episodes: one completion of a prompt, or a conversation with an environment turn by turn.

    prompt --sample--> completion                                                      (no environment)
    reset(row) -> messages --template--> prompt --sample--> completion --step--> messages --template--> … until done

Only the model's own tokens are scored. What it sampled is kept as it was sampled: later turns are appended to those very
tokens, never tokenized again.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from orchestrator.episodes import Completion, Prompt, Rollout, RolloutGroup, Sampling
from orchestrator.errors import ConfigError, DataError
from orchestrator.records import Finish, Ints
from orchestrator.rollout.sampling import sample_seed
from orchestrator.rollout.static import Request

Messages = list[dict[str, Any]]
_ANSWER = "\x02answer\x03"
"""Stands for the assistant's text where the template is asked what comes after it."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What an environment says to a completion: its messages, whether the episode is over, and a reward (summed up)."""

    messages: Messages = field(default_factory=list)
    done: bool = False
    reward: float = 0.0


class Environment(Protocol):
    """One episode with the model. A new object is made for every rollout.

    Example: orchestrator/rollout/calculator.py, a tool that the model may call before it answers.
    """

    def reset(self, row: Mapping[str, Any]) -> Messages:
        """The conversation that the episode begins with; row: `prompt` and the other columns of the data. The same row must
        always give the same messages: the samples of a prompt share it."""
        ...

    def step(self, completion: str) -> Turn:
        """Answers the model's turn."""
        ...


Factory = Callable[[], Environment]


class Decoder(Protocol):
    """Samples completions for requests with weights that are already in place."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Completion, ...]]: ...


def load_environment(spec: str) -> Factory:
    """The class named by `module:Class` or `file.py:Class`; ConfigError where there is none."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ConfigError(f"rollouts.environment: {spec!r} names no class", fix="write module:Class or file.py:Class")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise ConfigError(f"rollouts.environment: no file {place}", fix="give a path relative to where you start the run")
        found = importlib.util.spec_from_file_location(f"environment_{Path(place).stem}", place)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[found.name] = module  # dataclasses look their module up
        found.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ConfigError(f"rollouts.environment: {error}", fix="install it, or give a file.py:Class") from error
    factory = getattr(module, name, None)
    if not callable(getattr(factory, "reset", None)) or not callable(getattr(factory, "step", None)):
        raise ConfigError(f"rollouts.environment: {place} has no class {name} with reset and step", fix="see orchestrator.rollout.turns.Environment")
    return factory  # pyright: ignore[reportReturnType]


class Roller:
    """Rolls out groups with one decoder and, where the recipe names one, an environment."""

    def __init__(self, decoder: Decoder, tokenizer: Any, environment: Factory | None, max_turns: int) -> None:
        self.decoder, self.tokenizer, self.environment, self.max_turns = decoder, tokenizer, environment, max_turns

    def roll_out(self, work: Sequence[tuple[int, Prompt]], sampling: Sampling, version: int) -> tuple[RolloutGroup, ...]:
        """A group for each (draw, prompt), in order."""
        if self.environment is None:
            return self._single(work, sampling, version)
        return self._episodes(work, sampling, version, self.environment)

    def _single(self, work: Sequence[tuple[int, Prompt]], sampling: Sampling, version: int) -> tuple[RolloutGroup, ...]:
        requests = [Request(p.ids, _seeds(sampling, p.id, draw, version), sampling.max_new_tokens) for draw, p in work]
        groups = []
        for (draw, prompt), completions in zip(work, self.decoder.generate(requests, sampling), strict=True):
            rollouts = tuple(
                Rollout(k, version, c.ids, np.ones(len(c.ids), np.bool_), c.logprobs, c.finish, self._shown(prompt.text, c.ids), kept=c.kept)
                for k, c in enumerate(completions)
            )
            groups.append(RolloutGroup(prompt, draw, rollouts))
        return tuple(groups)

    def _episodes(
        self, work: Sequence[tuple[int, Prompt]], sampling: Sampling, version: int, environment: Factory
    ) -> tuple[RolloutGroup, ...]:
        groups = [self._begin(draw, prompt, sampling, version, environment) for draw, prompt in work]
        for _ in range(self.max_turns):
            active = [e for group in groups for e in group if e.finish is None]
            if not active:
                break
            requests = [Request(e.tokens(), (e.seed,), e.room, e.drawn) for e in active]
            for episode, (completion,) in zip(active, self.decoder.generate(requests, sampling), strict=True):
                self._advance(episode, completion)
        return tuple(
            RolloutGroup(group[0].prompt, draw, tuple(e.rollout(version) for e in group)) for (draw, _), group in zip(work, groups, strict=True)
        )

    def _begin(self, draw: int, prompt: Prompt, sampling: Sampling, version: int, environment: Factory) -> list["_Episode"]:
        episodes = []
        for sample, seed in enumerate(_seeds(sampling, prompt.id, draw, version)):
            world = environment()
            messages = deepcopy(world.reset(deepcopy({**prompt.columns, "prompt": prompt.text})))  # it may write on in both
            if episodes and messages != episodes[0].messages:
                raise DataError(f"{prompt.where}: the environment began two episodes of one row differently", fix="make reset a function of the row")
            ids = episodes[0].prompt.ids if episodes else np.array(self._render(messages, prompt), np.int64)
            told = replace(prompt, ids=ids, text=messages)
            episodes.append(_Episode(sample, seed, world, told, messages, sampling.max_new_tokens))
        return episodes

    def _advance(self, episode: "_Episode", completion: Completion) -> None:
        """Adds the model's turn, asks the environment, and adds what it says if the model has a turn left."""
        episode.add(completion.ids, scored=True)
        episode.logprobs.append(completion.logprobs)
        if completion.kept is not None:
            episode.kept.append(completion.kept)
        text = self._text(completion.ids)
        episode.said.append({"role": "assistant", "content": text})
        episode.drawn += len(completion.ids)
        episode.turns += 1
        turn = episode.world.step(text)
        episode.reward += turn.reward
        episode.said += deepcopy(turn.messages)
        suffix = [] if turn.done else self._suffix(turn.messages, completion, episode.prompt)
        if turn.done:
            episode.finish = completion.finish
        elif completion.finish == "length" or len(suffix) >= episode.room or episode.turns >= self.max_turns:
            episode.finish = "length"
        else:
            episode.add(np.array(suffix, np.int64), scored=False)

    def _suffix(self, messages: Messages, completion: Completion, prompt: Prompt) -> list[int]:
        """The tokens between the model's turn and its next: what the template writes after the assistant's text."""
        before = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}]
        whole = self.tokenizer.apply_chat_template([*before, *messages], tokenize=False, add_generation_prompt=True)
        _, found, tail = whole.rpartition(_ANSWER)
        if not found:
            raise ConfigError(f"{prompt.where}: the chat template changes the assistant's text", fix="use another model.chat_template")
        last = int(completion.ids[-1])
        if last == self.tokenizer.eos_token_id or last in self.tokenizer.added_tokens_decoder:  # <|eot_id|> is not Llama's eos_token
            tail = tail.removeprefix(self.tokenizer.decode([last]))  # the model wrote it itself
        return list(self.tokenizer(text=tail, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Messages, prompt: Prompt) -> list[int]:
        if not self.tokenizer.chat_template:
            what = f"{prompt.where}: environments speak in messages, but the tokenizer has no chat template"
            raise ConfigError(what, fix="set model.chat_template")
        output = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
        return list(output["input_ids"])

    def _text(self, ids: Ints) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def _shown(self, prompt: Any, ids: Ints) -> Any:
        """A completion as TRL hands it to reward functions: text for text, messages for messages."""
        text = self._text(ids)
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


@dataclass(slots=True)
class _Episode:
    """A conversation under way. room: tokens that may still follow; drawn: tokens the seed has been used for."""

    sample: int
    seed: int
    world: Environment
    prompt: Prompt
    messages: Messages
    room: int
    ids: list[Ints] = field(default_factory=list)
    scored: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    kept: list[np.ndarray] = field(default_factory=list)
    said: Messages = field(default_factory=list)
    drawn: int = 0
    turns: int = 0
    reward: float = 0.0
    finish: Finish | None = None

    def tokens(self) -> Ints:
        return np.concatenate([self.prompt.ids, *self.ids])

    def add(self, ids: Ints, *, scored: bool) -> None:
        self.ids.append(ids)
        self.scored.append(np.full(len(ids), scored, np.bool_))
        self.room -= len(ids)

    def rollout(self, version: int) -> Rollout:
        return Rollout(
            sample=self.sample,
            version=version,
            ids=np.concatenate(self.ids),
            scored=np.concatenate(self.scored),
            logprobs=np.concatenate(self.logprobs),
            finish=self.finish or "length",
            completion=self.said,
            turns=self.turns,
            environment_reward=self.reward,
            kept=np.concatenate(self.kept) if self.kept else None,
        )


def _seeds(sampling: Sampling, prompt: int, draw: int, version: int) -> tuple[int, ...]:
    return tuple(sample_seed(sampling.seed, prompt, draw, k, version) for k in range(sampling.samples))

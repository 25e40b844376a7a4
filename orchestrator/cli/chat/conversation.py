"""A conversation with one model, which remembers its messages.

messages --template--> tokens --generate, token by token--> text --> messages
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig, TextStreamer

from orchestrator.cli.chat.models import ChatModel
from orchestrator.core.errors import ConfigError
from orchestrator.data.template import render

MARK = "END-OF-THIS"
"""Stands for the assistant's text when the template is asked what follows it."""
Ended = Literal["finished", "max_new_tokens", "interrupted"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are sampled."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 takes the likeliest token."""
    seed: int = 0
    """Seed of a conversation's first answer; each further turn adds to it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a model."""

    text: str
    """Without the tokens that end it."""
    tokens: int
    """Number of tokens, the end token included."""
    ended: Ended
    """Why no more were written."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What `data.template.render` reads beside the messages."""

    where: str
    """Name of the model, for error messages."""
    tools: None = None

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        return {}


class Conversation:
    """A conversation with one model. Without a chat template it continues each text and remembers nothing."""

    def __init__(self, loaded: ChatModel, settings: Settings, name: str, system: str | None = None) -> None:
        self.loaded, self.settings, self.name = loaded, settings, name
        self.has_template = bool(loaded.tokenizer.chat_template)
        if system is not None and not self.has_template:
            raise ConfigError(
                f"--system: {name} has no chat template, so a system message has no place",
                fix="leave --system out",
            )
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._ends = _end_tokens(loaded, Inputs(name)) if self.has_template else _end_tokens(loaded, None)
        self._turns: list[dict[str, str]] = []
        # The model's own would fill in sampling settings that the user did not set.
        loaded.model.generation_config = GenerationConfig()

    def reset(self) -> None:
        """Forgets all messages but the system message."""
        self._turns = []

    def say(self, text: str, write: Callable[[str], None]) -> Answer:
        """Answers a user's text, hands the answer to `write` as it comes and remembers both.

        ConfigError if the model has no positions left for it.
        """
        turns = [*self._turns, {"role": "user", "content": text}]
        ids = self._ids(text, turns)
        limit = min(self._tokens_left(len(ids)), self.settings.max_new_tokens)
        answer = self._generate(ids, limit, write)
        if self.has_template:
            self._turns = [*turns, {"role": "assistant", "content": answer.text}]
        return answer

    def _ids(self, text: str, turns: list[dict[str, str]]) -> list[int]:
        if not self.has_template:
            tokenizer = self.loaded.tokenizer
            first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            return list(tokenizer(text)["input_ids"]) or [first]
        encoded = render(
            self.loaded.tokenizer, [*self._system, *turns], Inputs(self.name), add_generation_prompt=True
        )
        return list(encoded["input_ids"])

    def _tokens_left(self, length: int) -> int:
        """Tokens that may follow `length` tokens."""
        positions = (
            getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        )
        if length >= positions:
            why = f"it has {length:,} tokens, and {self.name} has {positions:,} positions"
            raise ConfigError("the conversation is too long for the model", why=why, fix="/reset forgets it")
        return positions - length

    def _generate(self, ids: list[int], limit: int, write: Callable[[str], None]) -> Answer:
        sampled = self.settings.temperature > 0
        sampling: dict[str, Any] = (
            {"temperature": self.settings.temperature, "top_k": 0, "top_p": 1.0} if sampled else {}
        )
        tokenizer, device = self.loaded.tokenizer, self.loaded.device
        config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=sampled,
            eos_token_id=self._ends,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            **sampling,
        )
        stream = _Stream(tokenizer, write)
        prompt, interrupted = torch.tensor([ids], device=device), False
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.settings.seed + len(self._turns))
            try:
                self.loaded.model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=stream
                )
            except KeyboardInterrupt:  # the user has read enough; the text so far is kept
                stream.end()
                interrupted = True
        finished = bool(stream.ids) and stream.ids[-1] in self._ends
        text = tokenizer.decode(stream.ids[:-1] if finished else stream.ids, skip_special_tokens=True)
        ended: Ended = "interrupted" if interrupted else "finished" if finished else "max_new_tokens"
        return Answer(text, len(stream.ids), ended)


class _Stream(TextStreamer):
    """Passes each complete word to `write`, and keeps the tokens."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ids: list[int] = []
        self._write = write

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._write(text)


def _end_tokens(loaded: ChatModel, template: Inputs | None) -> list[int]:
    """Tokens that end an answer.

    These are the tokenizer's eos, those of the generation config, and the special token that the template
    writes after the assistant's text.
    """
    config = getattr(loaded.model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    ends = [
        loaded.tokenizer.eos_token_id,
        *(own if isinstance(own, list) else [own] if own is not None else []),
    ]
    if template is not None:
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        rendered = render(loaded.tokenizer, turn, template, tokenize=False, return_dict=False)
        _, _, closing = rendered.rpartition(MARK)
        after = loaded.tokenizer(closing, add_special_tokens=False)["input_ids"][:1]
        ends += [token for token in after if token in loaded.tokenizer.added_tokens_decoder]
    return list(dict.fromkeys(ends))

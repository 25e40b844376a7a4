"""A conversation with a model: what was said, what the template makes of it, and the tokens of the next
answer.

messages --template--> tokens --generate, token by token--> text --> messages
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig, TextStreamer

from orchestrator.cli.chat.models import Loaded
from orchestrator.core.errors import ConfigError
from orchestrator.data.template import render

MARK = "END-OF-THIS"
"""A text after which a template closes a turn."""
Ended = Literal["finished", "max_new_tokens", "interrupted"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are drawn. temperature: 0 takes the likeliest token; seed: of the first answer of a
    conversation."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """text: without the tokens that end it; tokens: how many were written, the end among them; ended: why no
    more were."""

    text: str
    tokens: int
    ended: Ended


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a template is given beside the messages."""

    where: str
    tools: None = None

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        return {}


class Conversation:
    """With one model. Without a chat template a text is continued as it is, and nothing is remembered."""

    def __init__(self, loaded: Loaded, settings: Settings, name: str, system: str | None = None) -> None:
        self.loaded, self.settings, self.name = loaded, settings, name
        self.has_template = bool(loaded.tokenizer.chat_template)
        if system is not None and not self.has_template:
            raise ConfigError(
                f"--system: {name} has no chat template, so nothing says where a system message goes",
                fix="leave --system out",
            )
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._ends = _end_tokens(loaded, Inputs(name)) if self.has_template else _end_tokens(loaded, None)
        self._turns: list[dict[str, str]] = []
        loaded.model.generation_config = (
            GenerationConfig()
        )  # the model's own would fill in sampling settings that nobody asked for

    def reset(self) -> None:
        """Forgets what was said."""
        self._turns = []

    def say(self, text: str, write: Callable[[str], None]) -> Answer:
        """The answer to a user's text, handed to `write` as it comes; remembered. ConfigError where the model
        has no room for it."""
        turns = [*self._turns, {"role": "user", "content": text}]
        ids = self._ids(text, turns)
        room = self._room(len(ids))
        answer = self._generate(ids, min(room, self.settings.max_new_tokens), write)
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

    def _room(self, length: int) -> int:
        """Tokens that may follow so many."""
        most = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        if length >= most:
            why = f"it has {length:,} tokens, and {self.name} has {most:,} positions"
            raise ConfigError(
                "the conversation is too long for the model", why=why, fix="/reset forgets what was said"
            )
        return most - length

    def _generate(self, ids: list[int], most: int, write: Callable[[str], None]) -> Answer:
        sampled = self.settings.temperature > 0
        drawn: dict[str, Any] = (
            {"temperature": self.settings.temperature, "top_k": 0, "top_p": 1.0} if sampled else {}
        )
        tokenizer, device = self.loaded.tokenizer, self.loaded.device
        config = GenerationConfig(
            max_new_tokens=most,
            do_sample=sampled,
            eos_token_id=self._ends,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            **drawn,
        )
        stream = _Stream(tokenizer, write)
        prompt, interrupted = torch.tensor([ids], device=device), False
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.settings.seed + len(self._turns))
            try:
                self.loaded.model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=stream
                )
            except KeyboardInterrupt:  # the user has read enough; what was written is kept
                stream.end()
                interrupted = True
        finished = bool(stream.ids) and stream.ids[-1] in self._ends
        text = tokenizer.decode(stream.ids[:-1] if finished else stream.ids, skip_special_tokens=True)
        return Answer(
            text,
            len(stream.ids),
            "interrupted" if interrupted else "finished" if finished else "max_new_tokens",
        )


class _Stream(TextStreamer):
    """Hands on words as they are complete, and keeps the tokens."""

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


def _end_tokens(loaded: Loaded, template: Inputs | None) -> list[int]:
    """Tokens that end an answer: the tokenizer's eos, the generation config's, and what the template writes
    after the assistant's text."""
    config = getattr(loaded.model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    ends = [
        loaded.tokenizer.eos_token_id,
        *(own if isinstance(own, list) else [own] if own is not None else []),
    ]
    if template is not None:
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        _, _, closing = render(
            loaded.tokenizer, said, template, tokenize=False, return_dict=False
        ).rpartition(MARK)
        after = loaded.tokenizer(closing, add_special_tokens=False)["input_ids"][:1]
        ends += [token for token in after if token in loaded.tokenizer.added_tokens_decoder]
    return list(dict.fromkeys(ends))

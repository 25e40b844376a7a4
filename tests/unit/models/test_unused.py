"""A model whose code cannot be followed learns all the same, and the log says what is not known of it."""

import pytest
from transformers import LlamaForCausalLM

from orchestrator.config import Model, TinyModel
from orchestrator.models.load import load


def test_what_cannot_be_followed_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def needs_a_gpu(*_: object, **__: object) -> None:
        raise NotImplementedError("no kernel\nfor this device")

    monkeypatch.setattr(LlamaForCausalLM, "forward", needs_a_gpu)
    loaded = load(Model(tiny=TinyModel(hidden_size=16, layers=1)), seed=0, head="lm")
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    (line,) = caplog.messages
    assert line == "LlamaForCausalLM: what text never reaches could not be found, and nothing is frozen: NotImplementedError: no kernel"

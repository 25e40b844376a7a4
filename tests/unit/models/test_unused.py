"""A plan's model without storage has the same parameters as a learner's: tied ones count once, and those that
text never reaches are frozen. If the forward fails, nothing is frozen."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM

from orchestrator.models.load import build_fake, load, unreached
from orchestrator.recipe.schema import Lora, Model, TinyModel
from tests.architectures.journey import make_folder


def frozen(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["whole", "lora"])
@pytest.mark.parametrize(
    ("architecture", "tower"), [("llama", ""), ("mixtral", ""), ("gemma3", "vision_tower")]
)
def test_a_plan_freezes_what_a_learner_does(
    architecture: str, tower: str, lora: Lora | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(architecture, tmp_path)
    model = Model(path=str(tmp_path), lora=lora)
    planned = build_fake(model, "lm", torch.float32, FakeTensorMode(allow_non_fake_inputs=True))
    learned = load(model, seed=0, head="lm").model
    assert {n: p.shape for n, p in planned.named_parameters()} == {
        n: p.shape for n, p in learned.named_parameters()
    }, "the same ones are tied"
    assert frozen(planned) == frozen(learned)
    assert not [line for line in caplog.messages if "nothing is frozen" in line]
    assert any(tower in name for name in frozen(learned)) if tower or lora else not frozen(learned)
    assert unreached(planned) == unreached(learned) and bool(unreached(planned)) == bool(tower)
    adapters = [name for name, parameter in learned.named_parameters() if parameter.requires_grad]
    assert adapters and (not tower or not any(tower in name for name in adapters))


def test_a_forward_that_fails_is_logged_and_freezes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def needs_a_gpu(*_: object, **__: object) -> None:
        raise NotImplementedError("no kernel\nfor this device")

    monkeypatch.setattr(LlamaForCausalLM, "forward", needs_a_gpu)
    loaded = load(Model(tiny=TinyModel(hidden_size=16, layers=1)), seed=0, head="lm")
    assert not frozen(loaded.model)
    (line,) = caplog.messages
    assert line.startswith("LlamaForCausalLM: ") and line.endswith(": NotImplementedError: no kernel")

"""The parameters that decay are those that decay in transformers' Trainer."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from orchestrator.models.decay import parameter_groups
from orchestrator.models.forward import ScoringModel

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 100,
}


def make_model(kind: str) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))


def by_decay(groups: list[dict], model: nn.Module) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mixtral", "gpt_neox", "mamba"])
def test_the_groups_are_the_trainers(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    arguments = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[])
    theirs = by_decay(Trainer(model=model, args=arguments).create_optimizer().param_groups, model)
    ours = by_decay(parameter_groups(model, 0.1), model)
    assert ours == theirs
    assert 0.0 in ours.values() and 0.1 in ours.values()


def test_a_model_inside_the_learner_has_the_same_groups() -> None:
    model = make_model("qwen3")
    inside = by_decay(parameter_groups(ScoringModel(model, head="lm"), 0.1), model)
    assert inside == by_decay(parameter_groups(model, 0.1), model)


def test_a_step_is_the_trainers(tmp_path: Path) -> None:
    """The same gradients through transformers' optimizer (fused) and through ours, for three steps at a large
    learning rate. The decay alone moves a weight by about 1e-4 a step and a norm's weight by 5e-3; rounding
    of the two kernels moves it by 4e-7."""
    theirs, ours = make_model("qwen3"), make_model("qwen3")
    ours.load_state_dict(theirs.state_dict())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        weight_decay=0.5,
        learning_rate=1e-2,
        adam_beta2=0.99,
        use_cpu=True,
        report_to=[],
    )
    pair = (
        (theirs, Trainer(model=theirs, args=arguments).create_optimizer()),
        (ours, torch.optim.AdamW(parameter_groups(ours, 0.5), lr=1e-2, betas=(0.9, 0.99), eps=1e-8)),
    )
    ids = torch.arange(12)[None]
    for _ in range(3):
        for model, optimizer in pair:
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()  # pyright: ignore[reportCallIssue]
            optimizer.step()
    for (name, expected), parameter in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(
            parameter, expected, rtol=0.0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_step_without_gradient_moves_only_what_decays() -> None:
    model = make_model("gpt2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adam = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not {name for name in moved if "ln_" in name or name.endswith("bias")}
    assert "transformer.h.0.mlp.c_fc.weight" in moved


def test_without_decay_there_is_one_group() -> None:
    assert [group["weight_decay"] for group in parameter_groups(make_model("llama"), 0.0)] == [0.0]

"""The names of TRL's settings in docs/coming-from.md are TRL's."""

import dataclasses
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from.md"
ARGUMENTS = {"peft_config"}
"""Arguments of the trainers, not of their configurations."""


def test_trl_has_every_setting_that_is_named() -> None:
    from trl import DPOConfig, GRPOConfig

    settings = {
        field.name for config in (DPOConfig, GRPOConfig) for field in dataclasses.fields(config)
    } | ARGUMENTS
    section = PAGE.read_text().partition("## From TRL")[2].partition("## From OpenRLHF")[0]
    cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    values = {
        "grpo",
        "dr_grpo",
        "dapo",
        "cispo",
        "sequence_mask",
        "token_mask",
    }  # of loss_type and vllm_importance_sampling_mode
    named = {name for cell in cells for name in re.findall(r"`(\w+)(?:=\w+)?`", cell)} - values
    assert len(named) > 50
    assert not named - settings

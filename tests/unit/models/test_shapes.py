"""The table of known shapes against the parameter counts on the models' own pages."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.core.errors import ConfigError
from orchestrator.models.load import load_config
from orchestrator.models.shapes import SHAPES, as_folder, known_shape
from orchestrator.recipe.schema import Model

COUNTS = {
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_241_732_096,
    "smollm2-135m": 134_515_008,
}


def test_every_shape_has_the_parameters_of_its_model():
    assert COUNTS.keys() == SHAPES.keys()
    for name, shape in SHAPES.items():
        values = dict(shape)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == COUNTS[name], name


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("OpenRLHF/Llama-3-8b-sft-mixture", "llama-3-8b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b"),
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b"),
        ("somebody/qwen2.5-0.55b", None),
        (None, None),
    ],
)
def test_a_model_is_known_by_its_name(path, shape):
    assert known_shape(path) == shape


def test_a_shape_is_a_folder_without_weights_and_others_are_refused(tmp_path):
    with as_folder(Model(path="a/b", revision="main"), "qwen2.5-0.5b") as model:
        assert load_config(model).hidden_size == 896
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama-3.2-1b"]))
    for given in (str(tmp_path), str(tmp_path / "config.json")):
        with as_folder(Model(path="a/b", revision="main"), given) as model:
            assert load_config(model).num_hidden_layers == 16
    with pytest.raises(ConfigError, match="not in the table"), as_folder(Model(path="a/b"), "llama-9"):
        pass
    with (
        pytest.raises(ConfigError, match="no file"),
        as_folder(Model(path="a/b"), str(tmp_path / "other.json")),
    ):
        pass

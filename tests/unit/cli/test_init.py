"""`orchestrator init`: rows are recognised, values fit them, and what is written loads, plans and works."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.init.data_profile import ROWS_OF, InitRequest, parse_request, profile_data
from orchestrator.cli.init.recipe import REWARD, next_commands, save
from orchestrator.core.errors import ConfigError, DataError, MissingInput, OutputError
from orchestrator.models.load import load as load_model
from orchestrator.models.load import load_tokenizer
from orchestrator.recipe.loading import load
from orchestrator.recipe.schema import Model, TinyModel

GSM8K = Path(__file__).resolve().parents[2] / "data" / "gsm8k"
USER, YES, NO = (
    {"role": role, "content": text}
    for role, text in (("user", "ready?"), ("assistant", "yes"), ("assistant", "no"))
)
PAIR = {"prompt": "p?", "chosen": "yes", "rejected": "no"}
RECOGNISED: list[tuple[dict[str, Any], str, dict[str, str], str]] = [
    (PAIR, "dpo", {}, "preference, text"),
    (
        {"question": "p?", "good": "yes", "bad": "no"},
        "dpo",
        {"prompt": "question", "chosen": "good", "rejected": "bad"},
        "preference, text",
    ),
    ({"chosen": [USER, YES], "rejected": [USER, NO]}, "dpo", {}, "preference, conversational"),
    ({"messages": [USER, YES]}, "sft", {}, "conversation"),
    ({"dialog": [USER, YES]}, "sft", {"messages": "dialog"}, "conversation"),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "sft",
        {},
        "conversation",
    ),
    (
        {"instruction": "a", "output": "b"},
        "sft",
        {"prompt": "instruction", "completion": "output"},
        "prompt-completion, text",
    ),
    ({"text": "all of it is learned"}, "sft", {}, "text"),
    ({"question": "2 + 2?", "answer": "4"}, "grpo", {"prompt": "question"}, "prompt, text"),
    (
        {"question": "2 + 2?", "answer": "It is four, as two and two are four. " * 3},
        "sft",
        {"prompt": "question", "completion": "answer"},
        "prompt-",
    ),
    ({"prompt": [USER]}, "grpo", {}, "prompt, conversational"),
    ({"prompt": "a", "completion": "b", "label": True}, "kto", {}, "unpaired, text"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    cfg = Model(tiny=TinyModel(hidden_size=16, layers=1, heads=2))  # pyright: ignore[reportCallIssue]
    loaded: Any = load_model(cfg, seed=0, head="lm").model
    loaded.save_pretrained(folder)
    tokenizer = load_tokenizer(cfg)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if "
        "add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def rows(tmp_path: Path, record: dict[str, Any], count: int = 40, name: str = "rows.jsonl") -> str:
    (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for _ in range(count)))
    return str(tmp_path / name)


def of(
    model: str, train: str, kind: str | None = None, *columns: str, held_out: str | None = None
) -> InitRequest:
    return parse_request(model, None, train, held_out, kind, columns)


@pytest.mark.parametrize(("record", "kind", "columns", "form"), RECOGNISED, ids=lambda value: str(value)[:40])
def test_rows_are_recognised_and_the_recipe_reads_them(
    tmp_path: Path, model: str, record: dict[str, Any], kind: str, columns: dict[str, str], form: str
) -> None:
    request = of(model, rows(tmp_path, record))
    profile = profile_data(request)
    assert (profile.kind, profile.columns, profile.rows) == (kind, columns, 40) and profile.form.startswith(
        form
    )
    save(request, profile, tmp_path / "mine.yaml")
    (stage,) = load(tmp_path / "mine.yaml").stages
    assert not stage.ignored and stage.recipe.batch.effective <= max(40, 64)
    from orchestrator.run.stages import plan_stages

    ((_, plan),) = plan_stages([stage])
    assert (
        plan.data.kept == 40
        and not plan.data.bad
        and not any("more than the" in warning or "warms up" in warning for warning in plan.warnings)
    )


@pytest.mark.parametrize("kind", ROWS_OF)
@pytest.mark.parametrize("count", [1, 5, 33, 3000])
def test_values_fit_however_few_rows_there_are(tmp_path: Path, model: str, kind: str, count: int) -> None:
    record = {**PAIR, "completion": "yes", "label": True, "answer": "4"}
    request = of(model, rows(tmp_path, record, count), kind)
    profile = profile_data(request)
    save(request, profile, tmp_path / f"{kind}.yaml")
    recipe = load(tmp_path / f"{kind}.yaml").stages[0].recipe
    assert recipe.batch.effective <= count * (
        8 if kind == "grpo" else 1
    ) and recipe.data.max_length >= profile.quantile(1.0)
    assert recipe.algorithm.name == ("dpo" if kind == "lora-dpo" else kind) and (
        recipe.model.lora is not None
    ) == (kind == "lora-dpo")
    assert all(
        str(tmp_path / f"{kind}.yaml") in line for line in next_commands(profile, tmp_path / f"{kind}.yaml")
    )


@pytest.mark.parametrize(("answer", "function"), [("1,024", "last_number"), ("blue", "exact_match")])
def test_the_reward_follows_from_the_answers(tmp_path: Path, model: str, answer: str, function: str) -> None:
    request = of(model, rows(tmp_path, {"prompt": "a", "answer": answer}), "grpo")
    save(request, profile_data(request), tmp_path / "mine.yaml")
    assert load(tmp_path / "mine.yaml").stages[0].recipe.rewards.functions[0].function == function
    assert not (tmp_path / "reward.py").exists()


@pytest.mark.parametrize(
    "completion",
    ["One two three four five six.", [{"role": "assistant", "content": "One two three four five six."}]],
)
def test_the_written_reward_works_on_text_and_messages(
    tmp_path: Path, model: str, completion: object
) -> None:
    request = of(model, rows(tmp_path, {"prompt": "a"}))
    assert [file.name for file in save(request, profile_data(request), tmp_path / "mine.yaml")] == [
        "mine.yaml",
        "reward.py",
    ]
    assert (tmp_path / "reward.py").read_text() == REWARD
    reward = runpy.run_path(str(tmp_path / "reward.py"))["reward"]
    assert reward(
        prompts=["a"] * 2, completions=[completion, completion], completion_ids=[[1], [1]], other=["x", "x"]
    ) == [1.5, 1.5]


def test_nothing_is_overwritten(tmp_path: Path, model: str) -> None:
    request = of(model, rows(tmp_path, {"prompt": "a"}))
    profile = profile_data(request)
    (tmp_path / "reward.py").write_text("mine")
    with pytest.raises(OutputError, match=r"reward\.py exists already"):
        save(request, profile, tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists() and (tmp_path / "reward.py").read_text() == "mine"
    with pytest.raises(OutputError, match="none does not exist"):
        save(request, profile, tmp_path / "none" / "mine.yaml")


def test_an_error_about_columns_lists_the_columns_of_the_data(tmp_path: Path, model: str) -> None:
    train = rows(tmp_path, {"frage": "a", "gut": "b", "schlecht": "c"})
    with pytest.raises(ConfigError, match="not recognised") as refused:
        profile_data(of(model, train))
    assert (
        "columns are frage, gut, schlecht" in refused.value.why
        and "data.columns.chosen=" in refused.value.fix
    )
    with pytest.raises(ConfigError, match="no column for chosen, rejected") as refused:
        profile_data(of(model, train, "dpo"))
    assert (
        "frage, gut, schlecht" in refused.value.why
        and "data.columns.chosen=COLUMN data.columns.rejected=COLUMN" in refused.value.fix
    )
    given = ("data.columns.prompt=frage", "data.columns.chosen=gut", "rejected=schlecht")
    assert profile_data(of(model, train, None, *given)).kind == "dpo"
    with pytest.raises(ConfigError, match=r"data\.columns\.chosen=guut"):
        profile_data(of(model, train, "dpo", "data.columns.chosen=guut"))
    with pytest.raises(ConfigError, match=r"data\.columns\.choosen=gut"):
        of(model, train, "dpo", "data.columns.choosen=gut")
    with pytest.raises(ConfigError, match="--kind dpoo") as refused:
        of(model, train, "dpoo")
    assert refused.value.fix == "did you mean dpo?"


def test_missing_files_and_unusable_rows_are_errors(tmp_path: Path, model: str) -> None:
    with pytest.raises(MissingInput, match="no data file") as missing:
        profile_data(of(model, str(tmp_path / "row.jsonl")))
    rows(tmp_path, PAIR)
    with pytest.raises(MissingInput, match="no folder") as missing:
        profile_data(of(model[:-1], rows(tmp_path, PAIR)))
    assert model in missing.value.fix
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # models/nam looks like a hub name, and there is a folder models/
        patch.chdir(Path(model).parent.parent)
        with pytest.raises(MissingInput, match="no folder") as missing:
            profile_data(of(str(Path(model).relative_to(Path.cwd()))[:-1], rows(tmp_path, PAIR)))
        assert Path(model).name in missing.value.fix
    with pytest.raises(MissingInput):
        profile_data(of(model, rows(tmp_path, PAIR), held_out=str(tmp_path / "held.jsonl")))
    with pytest.raises(DataError, match="no usable row") as none:
        profile_data(of(model, rows(tmp_path, {"messages": "no list"}), "sft"))
    assert "40 rows: messages must be a non-empty list of messages" in none.value.why
    mixed = rows(tmp_path, {"messages": "no list"})
    Path(mixed).write_text(Path(mixed).read_text() + json.dumps({"messages": [USER, YES]}) + "\n")
    with pytest.raises(DataError, match="does not hold rows for sft"):
        profile_data(of(model, mixed, "sft"))


@pytest.mark.parametrize("file", ["preferences.jsonl", "train.jsonl"])
def test_real_rows(tmp_path: Path, model: str, file: str) -> None:
    request = of(model, str(GSM8K / file), held_out=str(GSM8K / file))
    profile = profile_data(request)
    assert (profile.kind, profile.rows) == ({"preferences.jsonl": "dpo", "train.jsonl": "sft"}[file], 64)
    save(request, profile, tmp_path / "mine.yaml")
    recipe = load(tmp_path / "mine.yaml").stages[0].recipe
    assert (
        recipe.data.eval == str(GSM8K / file)
        and recipe.evaluation.every is not None
        and 1 < recipe.batch.effective <= 8
    )

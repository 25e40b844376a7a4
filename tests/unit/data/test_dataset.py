"""From the data section to batches: held-out rows, prompts with answers, order, KTO's second branch."""

import json

import pytest

from orchestrator.algorithms.table import build
from orchestrator.core.errors import DataError, MissingInput
from orchestrator.recipe.loading import load
from orchestrator.recipe.schema import Generation
from orchestrator.run.inputs import read_data


def data(*overrides, name="dpo"):
    recipe = load(f"recipes/tiny/{name}.yaml", overrides).stages[0].recipe
    return read_data(recipe, build(recipe.algorithm))


def few(kind, split="train", rows=32):
    return f"[{{path: toy:{kind}, split: {split}, max_rows: {rows}}}]"


def test_batches_walk_through_every_row_once_an_epoch():
    data_set = data(f"data.train={few('preference', rows=20)}", "data.eval=null", "batch.effective=8")
    seen, cursor = [], 0
    for _ in range(5):
        step = data_set.batches.at(cursor)
        seen += [g.id for g in step]
        cursor += len(step)
    assert cursor == 40
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert seen[:20] != seen[20:]
    assert data_set.batches.steps_in(1.0) == 3
    assert (data_set.held_out, data_set.held_out_report, data_set.held_out_names, data_set.prompts) == (
        (),
        None,
        (),
        (),
    )


def test_a_plain_toy_name_holds_out_words_that_are_not_trained_on():
    data_set = data("data.train=toy:preference", "data.eval=toy:preference")
    trained = {tuple(g.prompt) for g in data_set.groups}
    assert len(data_set.held_out) == 256
    assert not trained & {tuple(g.prompt) for g in data_set.held_out}


def test_prompts_are_distinct_have_their_answers_and_are_bounded():
    data_set = data(
        f"data.train={few('preference')}", "data.eval=toy:preference", "evaluation.generate.max_prompts=40"
    )
    assert len(data_set.prompts) == len(set(data_set.prompts)) == len(data_set.answers) == 40
    for prompt, answer in zip(data_set.prompts, data_set.answers, strict=True):
        assert data_set.decode(prompt) == f"{answer}>"


def test_generation_takes_answers_from_rows_beyond_the_evaluated_ones():
    data_set = data(
        f"data.train={few('preference')}",
        "data.eval=toy:preference",
        "evaluation.max_examples=5",
        "evaluation.generate.max_prompts=16",
    )
    assert (len(data_set.held_out), len(data_set.prompts)) == (5, 16)


@pytest.mark.parametrize("off", ["evaluation.generate=null", "data.eval=null"])
def test_no_prompts_if_nothing_is_generated(off):
    assert data(f"data.train={few('preference')}", off).prompts == ()


def test_rows_without_an_answer_or_a_prompt_are_not_generated_for(tmp_path):
    rows = [
        {"prompt": "2+2=", "completion": "4", "answer": "4"},
        {"prompt": "3+3=", "completion": "6"},
        {"prompt": "", "completion": "hello", "answer": "hello"},
        {"prompt": "2+2=", "completion": "four", "answer": "four"},
    ]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data_set = data(f"data.train={few('sft')}", f"data.eval={path}", name="sft")
    assert [data_set.decode(p) for p in data_set.prompts] == ["2+2="]
    assert data_set.answers == ("4",)


def test_a_reward_model_generates_nothing():
    recipe = (
        load("recipes/tiny/reward.yaml", [f"data.train={few('reward')}", "data.eval=toy:reward"])
        .stages[0]
        .recipe
    )
    generation = Generation()  # pyright: ignore[reportCallIssue]
    evaluation = recipe.evaluation.model_copy(update={"generate": generation})
    with_generation = recipe.model_copy(update={"evaluation": evaluation})
    assert read_data(with_generation, build(recipe.algorithm)).prompts == ()


def test_kto_gets_a_mismatched_second_branch():
    data_set = data(f"data.train={few('unpaired')}", "data.eval=null", name="kto")
    assert all(len(g.branches) == 2 and g.label in (0.0, 1.0) for g in data_set.groups)
    assert any(tuple(g.branches[0].ids) != tuple(g.branches[1].ids) for g in data_set.groups)


def test_sources_are_mixed_by_weight():
    mixed = "[{path: toy:preference, max_rows: 20}, {path: toy:preference, max_rows: 10, weight: 2}]"
    data_set = data(f"data.train={mixed}", "data.eval=null", "batch.effective=40")
    step = data_set.batches.at(0)
    assert [sum(g.source == s for g in step) for s in (0, 1)] == [20, 20]
    assert data_set.batches.steps_in(1.0) == 1


def test_the_seed_decides_the_order_alone():
    def order(seed):
        return [
            g.id
            for g in data(f"data.train={few('preference')}", "data.eval=null", f"run.seed={seed}").batches.at(
                0
            )
        ]

    assert order(1) == order(1) != order(2)


def test_missing_and_corrupt_data_are_refused_before_anything_starts(tmp_path):
    with pytest.raises(MissingInput):
        data(f"data.train={tmp_path / 'nothing.jsonl'}")
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\nnot json\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        data(f"data.train={path}", "data.eval=null")

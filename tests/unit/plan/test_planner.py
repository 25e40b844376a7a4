"""Decisions of the plan with numbers: arithmetic, stage, sync, layout, micro-batch, errors, and the data
report."""

import json
from dataclasses import fields
from functools import lru_cache

import pytest

from orchestrator.algorithms.table import build
from orchestrator.core.errors import ConfigError, NotEnoughResources
from orchestrator.core.format import size
from orchestrator.data.dataset import DataSet
from orchestrator.data.packing import cost
from orchestrator.plan.hardware import Hardware, Machine, hypothetical_hardware, this_machine
from orchestrator.plan.planner import Plan, finer_cut, make_plan
from orchestrator.plan.ways import LEGAL_SYNC, first_steps, largest_micro_batch, memory_limit
from orchestrator.recipe.loading import load
from orchestrator.recipe.schema import Learners, Recipe
from orchestrator.run.inputs import read_data


@lru_cache
def _load(key: str) -> DataSet:
    recipe = Recipe.model_validate_json(key)
    return read_data(recipe, build(recipe.algorithm))


def data_of(recipe: Recipe) -> DataSet:
    """The recipe's data, loaded once for all recipes that differ only in what the data does not see."""
    batch = recipe.batch.model_copy(
        update={"micro_batch": "auto", "micro_batch_tokens": None, "memory_limit_gb": None, "layout": "auto"}
    )
    return _load(recipe.model_copy(update={"learners": Learners(), "batch": batch}).model_dump_json())


def plan(*overrides, base="recipes/tiny/dpo.yaml", rows=64, hardware: Hardware | None = None) -> Plan:
    rows_of = "toy:sft" if "sft" in base else "toy:preference"
    given = (
        []
        if any(o.startswith("data.train") for o in overrides)
        else [f"data.train=[{{path: {rows_of}, max_rows: {rows}}}]", "data.eval=null"]
    )
    recipe = (
        load(
            base, [*given, "batch.effective=16", "batch.micro_batch=auto", "model.tiny.layers=1", *overrides]
        )
        .stages[0]
        .recipe
    )
    algorithm = build(recipe.algorithm)
    return make_plan(recipe, algorithm, data_of(recipe), hardware)


def reason(found: Plan, name):
    return next((c.value, c.reason) for c in found.choices if c.name == name)


# ---- arithmetic


def test_256_pairs():
    found = plan("batch.effective=256", "batch.micro_batch=8", rows=256)
    assert found.arithmetic == "256 pairs = 2 workers × 16 micro-batches × 8 pairs"
    assert (found.micro_batches, found.nearest) == (16, ())


@pytest.mark.parametrize(
    ("workers", "micro", "text"),
    [
        (1, 16, "16 pairs = 1 worker × 1 micro-batch × 16 pairs"),
        (4, 2, "16 pairs = 4 workers × 2 micro-batches × 2 pairs"),
        (16, 1, "16 pairs = 16 workers × 1 micro-batch × 1 pairs"),
    ],
)
def test_one_worker_and_one_micro_batch_are_singular(workers, micro, text):
    assert plan(f"learners.workers={workers}", f"batch.micro_batch={micro}").arithmetic == text


def test_examples_of_sft():
    found = plan("learners.workers=2", "batch.micro_batch=4", base="recipes/tiny/sft.yaml")
    assert found.arithmetic == "16 examples = 2 workers × 2 micro-batches × 4 examples"


@pytest.mark.parametrize(
    ("effective", "text", "nearest"),
    [
        (50, "50 pairs = 2 workers × 4 micro-batches of at most 8 pairs, all divided once by 50", (48, 64)),
        (10, "10 pairs = 2 workers × 1 micro-batch of at most 8 pairs, all divided once by 10", (16,)),
    ],
)
def test_what_does_not_divide_names_its_neighbours(effective, text, nearest):
    found = plan(f"batch.effective={effective}", "batch.micro_batch=8")
    assert (found.arithmetic, found.nearest) == (text, nearest)
    assert plan(f"batch.effective={nearest[-1]}", "batch.micro_batch=8").nearest == ()


def test_a_token_budget_has_no_neighbours():
    found = plan("batch.micro_batch_tokens=40")
    assert (found.cut.examples, found.cut.positions, found.nearest) == (None, 40, ())
    assert (
        found.arithmetic
        == "16 pairs = 2 workers × 4 micro-batches of at most 40 positions, all divided once by 16"
    )
    assert reason(found, "micro-batch") == ("40 positions", "set in the recipe")


def test_a_token_budget_takes_the_place_of_a_micro_batch():
    found = plan("batch.micro_batch_tokens=40")  # tiny/base.yaml says micro_batch: 8
    assert (found.cut.examples, found.cut.positions) == (None, 40)
    with pytest.raises(ConfigError, match="does not read"):
        plan("batch.micro_batch_tokens=40", "batch.micro_batch=2")


def test_steps_of_a_run():
    assert plan().total_steps == 100
    assert plan("run.max_steps=null", "run.epochs=3").total_steps == 12


# ---- stage, micro-batch, memory


def limited(total, *overrides) -> Plan:
    """The plan where a worker may use `total` bytes."""
    return plan(f"batch.memory_limit_gb={total / 1e9:.9f}", "batch.memory_utilisation=1.0", *overrides)


NONE = "learners.activation_checkpointing=none"
SHAPE = ("model.tiny.hidden_size=1024", "model.tiny.layers=4", "model.tiny.vocab_size=8192")
"""67 M parameters: more than a bucket of reductions."""
BIG = ("learners.workers=4", "batch.micro_batch=1", NONE, *SHAPE)


@pytest.mark.parametrize(("precision", "stages"), [("fp32", [0, 1, 3]), ("bf16", [1, 2, 3])])
def test_less_memory_takes_a_higher_stage(precision, stages):
    """fp32's stage 2 holds gradients back whole, like stage 1, and saves nothing over it."""
    options = (*BIG, f"learners.precision={precision}")
    needs = {stage: plan(*options, f"learners.zero_stage={stage}").memory.total for stage in stages}
    assert list(needs.values()) == sorted(needs.values(), reverse=True)
    for number, stage in enumerate(stages):
        found = limited(needs[stage] + 1000, *options)
        assert found.cut.zero_stage == stage
        value, why = reason(found, "ZeRO stage")
        assert value == str(stage) and ("lowest stage" if number == 0 else "do not fit the memory") in why
    between = plan(*options, "learners.zero_stage=2", "learners.sync=per_micro_batch")
    assert needs[3] < between.memory.total < needs[1]
    found = limited(between.memory.total + 1000, *options)
    assert (found.cut.zero_stage, found.cut.sync) == (2, "per_micro_batch")
    with pytest.raises(NotEnoughResources) as error:
        limited(needs[3] - 1000, *options)
    assert (
        size(needs[3]) in error.value.what
        and "moments" in error.value.why
        and "learners.workers" in error.value.fix
    )


def test_a_given_stage_is_kept_and_refused_where_it_does_not_fit():
    need = plan(*BIG, "learners.zero_stage=0").memory.total
    assert reason(plan(*BIG, "learners.zero_stage=2"), "ZeRO stage") == ("2", "set in the recipe")
    with pytest.raises(NotEnoughResources):
        limited(need - 1000, *BIG, "learners.zero_stage=0")


def test_the_largest_micro_batch_that_fits_is_taken():
    options = (
        "batch.effective=64",
        "learners.workers=1",
        "learners.zero_stage=0",
        "model.tiny.vocab_size=2048",
        NONE,
    )
    free = plan(*options)
    assert free.cut.positions == cost(list(data_of(free.recipe).batches.at(0)), "prefix_shared")
    assert free.micro_batches == 1
    for share in (0.8, 0.6):
        found = limited(free.memory.total * share, *options)
        double = limited(1e9, *options, f"batch.micro_batch_tokens={found.cut.positions * 2}")
        assert found.memory.total <= found.memory_limit < double.memory.total
        assert found.micro_batches > 1
        assert "predicted memory" in reason(found, "micro-batch")[1]


def test_a_micro_batch_never_falls_below_one_example():
    free = plan("learners.workers=1")
    longest = max(cost([g], "prefix_shared") for g in data_of(free.recipe).groups)
    tightest = plan("learners.workers=1", "batch.micro_batch=1").memory.total
    assert limited(tightest + 1000, "learners.workers=1", "learners.zero_stage=0").cut.positions == longest


def test_memory_limit_is_the_used_share_of_the_device():
    recipe = plan("batch.memory_limit_gb=2", "batch.memory_utilisation=0.5").recipe
    assert memory_limit(recipe, this_machine()) == 1_000_000_000


def test_a_cpu_worker_gets_its_share_of_the_machine():
    one, four = plan("learners.workers=1").memory_limit, plan("learners.workers=4").memory_limit
    assert one // 4 == pytest.approx(four, abs=1)


def test_a_cpu_computes_nothing_again_where_activations_fit():
    assert reason(plan("batch.micro_batch=8"), "checkpointing")[0] == "none"
    assert plan("batch.micro_batch=8").recipe.learners.activation_checkpointing == "none"
    assert reason(plan("batch.micro_batch=8", "learners.activation_checkpointing=full"), "checkpointing") == (
        "full",
        "set in the recipe",
    )


def test_what_does_not_fit_is_computed_again_before_it_is_refused():
    options = (
        "batch.effective=64",
        "batch.micro_batch=64",
        "learners.workers=1",
        "learners.zero_stage=0",
        "model.tiny.layers=6",
    )
    needs = {
        mode: plan(*options, f"learners.activation_checkpointing={mode}").memory.total
        for mode in ("none", "selective", "full")
    }
    assert needs["none"] > needs["selective"] > needs["full"]
    for mode in ("none", "selective", "full"):
        found = limited(needs[mode] + 1000, *options)
        assert found.recipe.learners.activation_checkpointing == mode
    with pytest.raises(NotEnoughResources):
        limited(needs["full"] - 1000, *options)


# ---- cut finer


def tried_in_turn(found: Plan) -> tuple[list, NotEnoughResources]:
    """The cuts that finer_cut returns one after another, with the largest micro-batch of each, and its last
    error."""
    data = data_of(found.recipe)
    cut, seen = found.cut, []
    for _ in range(100):
        seen.append((cut.zero_stage, cut.sync, largest_micro_batch(first_steps(data), cut).positions))
        try:
            cut = finer_cut(found, data, cut)
        except NotEnoughResources as error:
            return seen, error
    raise AssertionError("no end")


def test_a_finer_cut_shrinks_the_largest_micro_batch_and_then_partitions_more():
    """The budget alone could be halved many times while the longest pair stays the same."""
    found = plan("learners.workers=4", "batch.effective=64", NONE, *SHAPE)
    seen, error = tried_in_turn(found)
    longest = max(cost([g], "prefix_shared") for g in data_of(found.recipe).groups)
    sizes = [positions for stage, _, positions in seen if stage == 0]
    assert sizes == sorted(set(sizes), reverse=True) and sizes[-1] == longest
    assert [(stage, sync) for stage, sync, positions in seen if positions == longest] == [
        (0, "no_sync"),
        (1, "no_sync"),  # (2, "coalesced") needs as much at its peak
        (2, "per_micro_batch"),
        (3, "per_micro_batch"),
    ]
    assert f"{longest} positions" in error.what and "weights" in error.why


def test_a_given_stage_is_kept_when_memory_runs_out():
    seen, error = tried_in_turn(plan("learners.workers=2", "learners.zero_stage=1", "batch.effective=64"))
    assert {stage for stage, *_ in seen} == {1}
    assert "ZeRO 1" in error.what


# ---- hardware


def test_ram_is_a_limit_as_well():
    """A model comes whole and in fp32 into the RAM of every process of a machine."""
    tight = Hardware((Machine(8, 8, 20_000_000_000, 80_000_000_000),))
    with pytest.raises(NotEnoughResources, match="RAM"):
        plan("learners.workers=8", "learners.gpus_per_worker=1", hardware=tight)
    enough = Hardware((Machine(8, 8, 200_000_000_000, 80_000_000_000),))
    assert (
        plan("learners.workers=8", "learners.gpus_per_worker=1", hardware=enough).ram_limit == 20_000_000_000
    )


@pytest.mark.parametrize(("what", "stage"), [("optimizer", 1), ("parameters", 3)])
def test_what_is_not_partitioned_cannot_be_offloaded(what, stage):
    """DeepSpeed ignores offload.optimizer at stage 0, and ends with an assertion for parameters below 3."""
    assert plan(f"learners.offload.{what}=cpu").cut.zero_stage == stage
    with pytest.raises(ConfigError, match=f"offload.{what}=cpu .*stage {stage - 1}"):
        plan(f"learners.offload.{what}=cpu", f"learners.zero_stage={stage - 1}")


def test_a_gpu_worker_gets_its_share_of_the_smallest_gpu():
    mixed = Hardware((Machine(8, 1, 10**12, 80_000_000_000), Machine(8, 1, 10**12, 40_000_000_000)))
    options = ("learners.workers=2", "batch.memory_utilisation=0.5")
    assert plan(*options, "learners.gpus_per_worker=1", hardware=mixed).memory_limit == 20_000_000_000
    assert plan(*options, "learners.gpus_per_worker=0.6", hardware=mixed).memory_limit == 12_000_000_000


def test_a_machine_that_can_hold_no_worker_limits_no_worker():
    head, machine = Machine(0, 0, 1_000_000_000), Machine(4, 0, 64_000_000_000)
    options = ("learners.workers=4", "batch.memory_utilisation=1.0")
    assert plan(*options, hardware=Hardware((head, machine))).memory_limit == 16_000_000_000


def test_the_time_on_the_wire_follows_from_the_bandwidth():
    found = plan(
        "learners.workers=4",
        "batch.micro_batch=4",
        hardware=hypothetical_hardware(2, "h100-80g", network_gbit=8),
    )
    value, why = reason(found, "communication")
    # a ring all-reduce over 4 workers sends 2 * 3/4 of the bytes; 8 Gbit/s are 1e9 bytes per second
    assert value == f"at least {1.5 * found.traffic.reduced / 1e9:.3g} s a step"
    assert "1 GB/s between 2 machines" in why and "given" in why
    assert "communication" not in {
        c.name for c in plan("learners.workers=1", hardware=hypothetical_hardware(2, "h100-80g")).choices
    }
    assert "communication" not in {
        c.name for c in plan("learners.workers=2").choices
    }  # the bandwidth of this machine is not known


# ---- sync


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("sync", ["no_sync", "coalesced", "per_micro_batch"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_legal_policies_are_planned(stage, sync, precision):
    options = (
        f"learners.zero_stage={stage}",
        f"learners.sync={sync}",
        f"learners.precision={precision}",
        "batch.micro_batch=4",
    )
    low = precision == "bf16"
    if sync in LEGAL_SYNC[stage] and not (low and (stage == 0 or sync == "coalesced")):
        found = plan(*options)
        assert (found.cut.zero_stage, found.cut.sync) == (stage, sync)
        assert reason(found, "sync")[1].startswith("set in the recipe; ")
    else:
        with pytest.raises(ConfigError) as error:
            plan(*options)
        assert error.value.why and error.value.fix


@pytest.mark.parametrize(
    ("stage", "precision", "sync", "word"),
    [
        (0, "fp32", "no_sync", "one reduction instead of one per micro-batch"),
        (1, "bf16", "no_sync", "one reduction instead of one per micro-batch"),
        (2, "fp32", "coalesced", "reduced once at the end of the step"),
        (2, "bf16", "per_micro_batch", "less memory, more traffic"),
        (3, "fp32", "per_micro_batch", "less memory, more traffic"),
    ],
)
def test_the_policy_of_each_stage_and_why(stage, precision, sync, word):
    found = plan(f"learners.zero_stage={stage}", f"learners.precision={precision}", "batch.micro_batch=4")
    assert found.cut.sync == sync
    assert reason(found, "sync")[0] == sync and word in reason(found, "sync")[1]


@pytest.mark.parametrize(("sync", "stage"), [("no_sync", 0), ("coalesced", 1), ("per_micro_batch", 2)])
def test_a_given_policy_finds_its_lowest_stage(sync, stage):
    assert plan(f"learners.sync={sync}").cut.zero_stage == stage


def test_a_policy_that_no_stage_can_take_is_refused():
    with pytest.raises(ConfigError, match="coalesced"):
        plan("learners.sync=coalesced", "learners.precision=bf16")


# ---- layout


def test_pairs_share_their_prompt_and_single_answers_are_padded_on_a_cpu():
    assert reason(plan(), "layout") == ("prefix_shared", "each prompt is computed once for its branches")
    assert plan(base="recipes/tiny/sft.yaml").cut.layout == "padded"
    assert plan("batch.layout=packed").cut.layout == "packed"


def test_an_architecture_that_was_not_shown_to_take_masks_gets_padded_rows():
    found = plan("model.tiny.architecture=bloom")
    assert reason(found, "layout") == ("padded", "bloom has not been shown to take a 4-D attention mask")
    with pytest.raises(ConfigError, match=r"batch\.layout=prefix_shared is not possible"):
        plan("model.tiny.architecture=bloom", "batch.layout=prefix_shared")


# ---- what cannot work


def test_more_workers_than_examples():
    with pytest.raises(ConfigError, match=r"batch\.effective=3 .*learners\.workers=4") as error:
        plan("batch.effective=3", "learners.workers=4")
    assert "3 or fewer" in error.value.fix


def test_fp16_on_a_cpu():
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        plan("learners.precision=fp16")


# ---- output


def test_the_json_holds_everything_and_nothing_that_json_cannot():
    found = plan("batch.micro_batch=4")
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert values.keys() == {f.name for f in fields(Plan)}
    assert values["memory"]["total"] == found.memory.total == sum(found.memory.parts.values())
    cut = {
        "workers": 2,
        "examples": 4,
        "positions": None,
        "layout": "prefix_shared",
        "zero_stage": 0,
        "sync": "no_sync",
        "one_row": False,
    }
    assert values["cut"] == cut
    assert [c["name"] for c in values["choices"]] == [
        "hardware",
        "layout",
        "ZeRO stage",
        "sync",
        "checkpointing",
        "micro-batch",
    ]
    assert values["recipe"]["batch"]["effective"] == 16


def rows_file(tmp_path):
    """Ten good pairs of 2 + n bytes and an end token, n = 1 … 10, a bad row, and one that is too long."""
    rows = [{"prompt": "ab", "chosen": "x" * n, "rejected": "y"} for n in range(1, 11)]
    rows.append({"prompt": "p" * 60, "chosen": "x", "rejected": "y"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"prompt": "no answers"}\n')
    return path


def test_the_data_report(tmp_path):
    path = rows_file(tmp_path)
    found = plan(
        f"data.train={path}",
        "data.max_bad_rows=1",
        "data.max_length=20",
        "data.overlong=drop",
        "batch.effective=4",
        "data.eval=null",
    )
    data = found.data
    assert (data.rows, data.kept, data.dropped, data.truncated, data.not_prefix, data.held_out) == (
        11,
        10,
        1,
        0,
        0,
        0,
    )
    assert len(data.bad) == 1 and data.bad[0].startswith(f"{path}:12: ")
    assert data.quantiles == {"min": 4, "median": 8, "p95": 12, "max": 13}
    assert data.histogram == ((4, 1), (6, 2), (8, 2), (10, 2), (12, 2), (14, 1))
    assert found.mean_length == (4 + 13) * 10 // 2 // 10


def test_the_data_report_counts_truncation(tmp_path):
    found = plan(
        f"data.train={rows_file(tmp_path)}",
        "data.max_bad_rows=1",
        "data.max_length=20",
        "batch.effective=4",
        "data.eval=null",
    )
    assert (found.data.kept, found.data.dropped, found.data.truncated) == (11, 0, 1)
    assert found.data.quantiles["max"] == 20


def test_the_largest_micro_batch_is_looked_for_in_several_steps():
    found = plan("batch.micro_batch=2")
    data = data_of(found.recipe)
    steps = first_steps(data)
    assert [g.id for step in steps for g in step] == [
        g.id for at in range(0, 64, 16) for g in data.batches.at(at)
    ]
    assert largest_micro_batch(steps, found.cut).positions == 2 * 15


@pytest.mark.parametrize(
    ("count", "text"),
    [(1_200_000_000, "1.20 GB"), (3_400_000, "3.4 MB"), (999_999_999, "1000.0 MB"), (0, "0.0 MB")],
)
def test_sizes_in_words(count, text):
    assert size(count) == text


@pytest.mark.parametrize("gpus", [2, 1.5])
@pytest.mark.parametrize("section", ["learners", "critic", "rollouts"])
def test_more_gpus_than_the_one_that_a_worker_computes_on_are_refused(section: str, gpus: float) -> None:
    with pytest.raises(ConfigError, match=f"{section}.gpus_per_worker is {gpus:g}") as refused:
        recipe = plan().recipe
        asked = getattr(recipe, section).model_copy(update={"gpus_per_worker": gpus})
        make_plan(
            recipe.model_copy(update={section: asked}),
            build(recipe.algorithm),
            data_of(recipe),
            hypothetical_hardware(1, "h100-80g"),
        )
    assert refused.value.why and "set it to 1" in refused.value.fix


def test_two_ranks_on_one_gpu_are_refused():
    with pytest.raises(ConfigError, match=r"learners\.gpus_per_worker=0\.5 .*2 workers"):
        plan(
            "learners.workers=2",
            "learners.gpus_per_worker=0.5",
            hardware=hypothetical_hardware(1, "h100-80g"),
        )
    recipe = plan("learners.workers=2").recipe
    halves = {
        "learners": recipe.learners.model_copy(update={"gpus_per_worker": 0.5}),
        "rollouts": recipe.rollouts.model_copy(update={"placement": "colocated", "gpus_per_worker": 0.5}),
    }
    beside = recipe.model_copy(update=halves)
    assert (
        make_plan(
            beside, build(recipe.algorithm), data_of(recipe), hypothetical_hardware(1, "h100-80g")
        ).cut.workers
        == 2
    )

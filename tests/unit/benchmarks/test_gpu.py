"""The records and the table of benchmarks/gpu.py. CI runs its stages at small sizes: `python
benchmarks/gpu.py --device cpu`."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its stages import each other by name, as a script's do

from gpu_stages import bench, table  # noqa: E402
from gpu_stages.bench import Check, Ended, Machine, Note, Speed  # noqa: E402

HOST = Machine("cuda", "NVIDIA H100 80GB HBM3", "torch 2.11.0", "python benchmarks/gpu.py", "2026-11-27")
OURS = Speed(
    4, "7B x 4 layers", "ours", "2 pairs", 20_000.0, 3.0, 0.46, 40.0, 42.0, (0.6931, 0.6021, 0.5), 2.0, 41.0
)
THEIRS = Speed(4, "7B x 4 layers", "TRL", "4 pairs", 8_000.0, 7.5, 0.25, 60.0, 61.0, (0.6931, 0.6022), 2.01)
GOOD, BAD = Check(1, "gap", "1e-07", "<= 1e-05", True), Check(1, "head", "0.3", "<= 0.03", False)
SLOW = Check(4, "MFU", "0.4", ">= 0.45", False, True)
DIED = Ended(3, "cluster", 90.0, "its deadline of 90 s passed")


def test_every_record_comes_back_from_its_line() -> None:
    for record in (HOST, OURS, THEIRS, GOOD, SLOW, Note(0, "a", "b"), DIED):
        assert bench.from_line(bench.to_line(record)) == record


def test_what_makes_the_run_fail() -> None:
    on_cpu = Machine("cpu", "CPU", "", "", "")
    assert not table.failed([HOST, GOOD, OURS])
    assert table.failed([HOST, GOOD, BAD])
    assert table.failed([HOST, GOOD, DIED])
    assert table.failed([HOST, SLOW])
    assert not table.failed([on_cpu, SLOW])  # a missed speed means nothing there
    assert table.failed([on_cpu, BAD])


def test_the_difference_is_the_largest_of_losses_and_norm_over_comparable_steps() -> None:
    off = replace(THEIRS, losses=(0.6931, 0.7))
    assert table.difference(OURS, THEIRS, "cpu") == pytest.approx(0.01 / 2.01)
    assert table.difference(OURS, off, "cpu") == pytest.approx((0.7 - 0.6021) / 0.7)
    assert table.difference(OURS, off, "cuda") == pytest.approx(0.01 / 2.01)


def test_the_table_shows_speeds_failures_and_parts_that_died() -> None:
    slower = Speed(
        4, "7B x 4 layers", "TRL", "1 pairs", 5_000.0, 12.0, 0.15, 50.0, 51.0, (0.6931, 0.6022), 2.01
    )
    lines = table.table(
        [
            HOST,
            THEIRS,
            slower,
            OURS,
            GOOD,
            BAD,
            SLOW,
            Note(0, "*ceilings", "798 TFLOP/s"),
            Note(0, "quiet", "x"),
            DIED,
        ]
    )
    text = "\n".join(lines)
    assert "NVIDIA H100 80GB HBM3; torch 2.11.0" in text and "    python benchmarks/gpu.py" in text
    assert (
        "| 7B x 4 layers | 20,000, 46%, 40.0 (2 pairs) | 8,000, 25%, 60.0 (4 pairs) | 2.50x, 5e-03 apart | "
        "41.00 / 40.00 |" in lines
    )
    assert (
        "| 1: head | 0.3 **FAILED** | <= 0.03 |" in lines and "| 4: MFU | 0.4 **missed** | >= 0.45 |" in lines
    )
    assert "- ceilings: 798 TFLOP/s" in lines and "quiet" not in text
    assert "- not ended: stage 3, cluster: its deadline of 90 s passed" in lines


def test_a_stage_that_was_run_again_replaces_its_older_results() -> None:
    again = replace(HOST, command="python benchmarks/gpu.py --only 1")
    third = replace(HOST, command="python benchmarks/gpu.py --only 3")
    kept = table.latest([HOST, BAD, OURS, again, GOOD, third, DIED])
    assert kept == [HOST, OURS, again, GOOD, third, DIED]
    assert table.latest([HOST, BAD, again, GOOD]) == [again, GOOD]
    assert [line for line in table.table(kept) if line.startswith("    ")] == [
        f"    {m.command}" for m in (HOST, again, third)
    ]


def test_a_table_has_forty_lines_at_most_and_never_hides_a_failure() -> None:
    many = [Check(2, f"check {i}", "1", "1", True) for i in range(100)]
    lines = table.table([HOST, *many, GOOD, BAD])
    assert len(lines) <= table.LINES
    assert "| 101 of 102 checks passed | result | limit |" in lines
    assert "| 1: head | 0.3 **FAILED** | <= 0.03 |" in lines and "| 2: 100 checks | passed | |" in lines
    assert "| 1: gap | 1e-07 | <= 1e-05 |" in lines  # the smaller stage fits in full


def test_the_page_keeps_one_table_for_each_card(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    other = Machine(
        "cpu", "CPU, 2 cores", "torch 2.13", "python benchmarks/gpu.py --device cpu", "2026-11-27"
    )
    for machine, speed in ((HOST, THEIRS), (other, OURS), (HOST, OURS)):
        table.write_page(page, [machine, speed])
    text = page.read_text()
    assert text.startswith(table.PAGE) and text.count("\n## ") == 2
    assert text.index("## NVIDIA H100") < text.index("## CPU, 2 cores")
    assert "8,000" not in text and text.count("20,000") == 2


def test_a_part_that_fails_or_has_no_run_is_recorded_with_its_error(tmp_path: Path) -> None:
    """Runs a stage whose module does not exist, and a module without a function `run`."""
    script = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu
from pathlib import Path
environment = gpu.environment_of("cpu", None)
gpu.child("cpu", 0, "missing", 20.0, Path("out.jsonl").resolve(), environment)
gpu.child("cpu", 0, "bench", 20.0, Path("out.jsonl").resolve(), environment)
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=60)
    missing, no_run = bench.read(tmp_path / "out.jsonl")
    assert isinstance(missing, Ended) and missing.error is not None and "missing" in missing.error
    assert isinstance(no_run, Ended) and no_run.error is not None and "run" in no_run.error

"""The plan's predicted peak against the resident memory of a real DeepSpeed rank, each in a new process."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "seed_arithmetic.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("seed_arithmetic", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("model", "effective", "micro"), [("tiny", 16, 16), ("tiny", 32, 4), ("50m", 4, 4)])
def test_predicted_peak_is_within_a_fifth_of_the_measured_one(benchmark, tmp_path, model, effective, micro):
    data = tmp_path / "pairs.jsonl"
    benchmark.write_pairs(data, 2 * effective)
    row = benchmark.child(model, effective, micro, data)
    assert row.predicted == pytest.approx(row.measured, rel=0.2)

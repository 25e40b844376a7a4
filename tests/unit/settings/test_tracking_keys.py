"""Two runs recorded by wandb itself, offline: where they stand there, and what they wait for."""

from pathlib import Path

import pytest

from orchestrator.observe.wandb_sink import WandbSink
from orchestrator.recipe.loading import load
from tests.unit.settings.contexts import BASE

FIRST = {"project": "one", "entity": "us", "group": "sweep", "init_timeout_s": 40.0, "finish_timeout_s": 50.0}
SECOND = {"project": "other", "entity": None, "group": None, "init_timeout_s": 20.0, "finish_timeout_s": 30.0}


@pytest.mark.parametrize("wanted", [FIRST, SECOND], ids=["first", "second"])
def test_a_run_stands_where_the_recipe_says(tmp_path: Path, wanted: dict) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(BASE)
    words = [f"tracking.{key}={'null' if value is None else value}" for key, value in wanted.items()]
    tracking = load(file, words).stages[0].recipe.tracking
    sink = WandbSink(tmp_path / "run", tracking, "name", {}, "id")
    notes: list[str] = []
    sink.open(notes.append)
    run = sink._run
    assert run is not None, notes
    found = {"project": run.project, "entity": run.entity or None, "group": run.group or None}
    settings = run.settings
    sink.close()
    assert (
        found | {"init_timeout_s": settings.init_timeout, "finish_timeout_s": settings.finish_timeout}
        == wanted
    )

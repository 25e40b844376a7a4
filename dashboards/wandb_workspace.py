"""Lays out a wandb workspace after an existing run: a section per question, a panel per chart of report.html.

    pip install wandb-workspaces
    python dashboards/wandb_workspace.py runs/tiny-dpo --dry-run
    python dashboards/wandb_workspace.py runs/tiny-dpo --entity my-team

The workspace has panels for the metrics that the run emits: a DPO run gives a DPO dashboard, a PPO run an RL
dashboard.
"""

import argparse
from pathlib import Path
from typing import Any

from orchestrator.core.files import read_lines
from orchestrator.observe.metric_names import grouped
from orchestrator.observe.report.panels import board
from orchestrator.observe.wandb_sink import STEP
from orchestrator.recipe.strict_yaml import parse


def emitted(run_dir: Path) -> set[str]:
    """The metrics in a run's metrics.jsonl."""
    return {name for line in read_lines(run_dir / "metrics.jsonl") for name in line}


def workspace(run_dir: Path, entity: str, project: str | None) -> Any:
    """The workspace, not saved yet. project: None for the project of the run."""
    import wandb_workspaces.reports.v2 as reports  # pyright: ignore[reportMissingImports]
    import wandb_workspaces.workspaces as workspaces  # pyright: ignore[reportMissingImports]

    recipe, _ = parse((run_dir / "recipe.yaml").read_text("utf-8"), str(run_dir / "recipe.yaml"))
    sections = [
        workspaces.Section(
            name=question,
            panels=[
                reports.LinePlot(title=title, x=STEP, y=[grouped(name) for name in names])
                for title, names in panels
            ],
            is_open=True,
        )
        for question, panels in board(emitted(run_dir))
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project or recipe.get("tracking", {}).get("project", "orchestrator"),
        name=f"{recipe['algorithm']['name']}: learning, stable, fast, healthy",
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run_dir", type=Path, help="the --output folder of a run")
    parser.add_argument("--entity", default="", help="the user or team that owns the project")
    parser.add_argument("--project", help="default: tracking.project of the run")
    parser.add_argument("--dry-run", action="store_true", help="only print the layout")
    arguments = parser.parse_args()
    if arguments.dry_run:
        for question, panels in board(emitted(arguments.run_dir)):
            print(
                question,
                *(f"  {title}: {', '.join(map(grouped, names))}" for title, names in panels),
                sep="\n",
            )
    elif not arguments.entity:
        parser.error("--entity is needed to save a workspace")
    else:
        saved = workspace(arguments.run_dir, arguments.entity, arguments.project).save()
        print(saved.url)


if __name__ == "__main__":
    main()

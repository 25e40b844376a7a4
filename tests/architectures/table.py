"""Writes the table of docs/models.md: `python -m tests.architectures.table [NAME …]` runs all architectures,
or the named ones, and replaces their rows. All of them take 20 minutes on one core."""

import socket
import sys
import tempfile
from pathlib import Path

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
)

from orchestrator.learner.engine import ProcessGroup
from tests.architectures.journey import Outcome, journey

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
COMPOSITE = ("mistral3", "qwen2_5_vl")
"""Models of text and images that are not among transformers' causal language models, as gemma3 and llama4
are."""
NAMES = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *COMPOSITE)
START, END = "<!-- table -->", "<!-- end of table -->"
HEAD = "| architecture | class | outcome | why |\n|---|---|---|---|"


def rows() -> dict[str, str]:
    """Rows of the page's table by architecture."""
    body = PAGE.read_text().split(START)[1].split(END)[0]
    return {
        line.split("|")[1].strip(): line
        for line in body.splitlines()
        if line.startswith("| ") and "architecture |" not in line
    }


def write(table: dict[str, str]) -> None:
    """Writes the rows into the page, in transformers' order, with their counts."""
    lines = [table[name] for name in NAMES if name in table]
    count = {
        verdict: sum(f"| {verdict} |" in line for line in lines)
        for verdict in ("works", "refused", "no configuration", "fault")
    }
    summary = ", ".join(f"{number} {verdict}" for verdict, number in count.items() if number)
    before, rest = PAGE.read_text().split(START)
    after = rest.split(END)[1]
    PAGE.write_text(
        f"{before}{START}\n{len(lines)} architectures: {summary}.\n\n{HEAD}\n"
        + "\n".join(lines)
        + f"\n{END}{after}"
    )


def joined() -> ProcessGroup:
    """A process group with this process as its only member."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = ProcessGroup(0, 1, "127.0.0.1", port, 60.0)
    group.join(torch.device("cpu"))
    return group


def main(names: list[str]) -> int:
    """Runs `names`, or all. Returns the number of faults, which is the exit code."""
    torch.set_num_threads(1)
    group, faults = joined(), 0
    for name in names or NAMES:
        outcome: Outcome = journey(name, Path(tempfile.mkdtemp(prefix="architecture-")), group)
        print(outcome.row, flush=True)
        if outcome.verdict == "fault":
            faults += 1
            print(outcome.why, file=sys.stderr)
        write({**rows(), name: outcome.row})
    return faults


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

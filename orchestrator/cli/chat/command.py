"""`chat`: a conversation with a trained model, or with two side by side, in a terminal or in a pipe.

Heavy imports stand inside the command, as in `cli/main.py`.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.cli.options import RESULTS
from orchestrator.core.errors import ConfigError, OrchestratorError

if TYPE_CHECKING:
    from orchestrator.cli.chat.conversation import Conversation

app = typer.Typer(add_completion=False)
HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends, Ctrl-C ends an answer"
CUT = {"max_new_tokens": " …\n(cut: --max-new-tokens gives it more room)", "interrupted": " …\n(interrupted)"}
"""What follows an answer that was cut off, by why it ended."""


@app.command(rich_help_panel=RESULTS)
def chat(
    model: Annotated[
        str,
        typer.Argument(metavar="RUN|MODEL", help="run folder, model or adapter folder, or ORG/NAME@REVISION"),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|MODEL",
            help="second model beside it, or `base` for the model that the run started from",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="system message before the conversation")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="prompt to answer before ending; each one is a separate conversation"
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 512,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, help="0 takes the likeliest token, 1 samples from the model's distribution"),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="seed of the sampling")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object per prompt, each on one line")
    ] = False,
) -> None:
    """Chat with a trained model, in a terminal or a pipe.

    In a pipe each line of the input is a prompt and a separate conversation.
    """
    prompts = prompt or None
    if prompts is None and not sys.stdin.isatty():
        prompts = (line.rstrip("\n") for line in sys.stdin if line.strip())
    if prompts is None and as_json:
        raise ConfigError(
            "--json needs prompts, not a conversation",
            fix="give --prompt TEXT, or pipe prompts into standard input",
        )
    console = Console(highlight=False, soft_wrap=True, markup=False)
    notes = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    conversations, has_start = _open(model, against, system, (max_new_tokens, temperature, seed), notes)
    if prompts is not None:
        for text in prompts:
            _answer_once(conversations, text, as_json, alone=prompt is not None and len(prompt) == 1)
        return
    notes.print(
        f"{' and '.join(c.name for c in conversations)}. {HELP}."
        + ("" if against or not has_start else " --against base compares.")
    )
    _talk(conversations, console)


def _open(
    model: str, against: str | None, system: str | None, settings: tuple[int, float, int], notes: Console
) -> "tuple[list[Conversation], bool]":
    """The conversations, and whether the first model is a run's, which `--against base` can compare."""
    from orchestrator.cli.chat.models import BASE, find

    first = find(model)  # a wrong name is an error before the weights are read
    choices = [first]
    if against is not None:
        other = first.start if against == BASE and not Path(BASE).exists() else find(against)
        if other is None:
            raise ConfigError(
                f"--against base: {model} is not a run",
                why="only a run records the model that it started from",
                fix="give the other model's folder",
            )
        choices.append(other)
    with notes.status("reading the weights") if notes.is_terminal else nullcontext():
        import torch
        from transformers.utils import logging

        from orchestrator.cli.chat.conversation import Conversation, Settings
        from orchestrator.cli.chat.models import load
        from orchestrator.plan.hardware import visible_gpus

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        device = torch.device("cuda" if visible_gpus() else "cpu")
        conversations = [
            Conversation(load(choice, device), Settings(*settings), choice.name, system) for choice in choices
        ]
    for conversation in conversations:
        if not conversation.has_template:
            notes.print(
                f"{conversation.name} has no chat template: it continues each text and remembers nothing"
            )
    return conversations, first.start is not None


def _answer_once(conversations: "Sequence[Conversation]", text: str, as_json: bool, *, alone: bool) -> None:
    """Prints each model's answer to one prompt without a history; the prompt too, unless it is `alone`."""
    answers = []
    for conversation in conversations:
        conversation.reset()
        answers.append(conversation.say(text, lambda words: None))
        if answers[-1].ended == "interrupted":
            sys.exit(128 + 2)
    if as_json:
        records = [
            {"model": c.name, **asdict(answer)} for c, answer in zip(conversations, answers, strict=True)
        ]
        print(json.dumps({"prompt": text, "answers": records}, ensure_ascii=False), flush=True)
        return
    if not alone or len(answers) > 1:
        print(f"> {text}")
    for conversation, answer in zip(conversations, answers, strict=True):
        heading = f"[{conversation.name}] " if len(answers) > 1 else ""
        print(f"{heading}{answer.text}", flush=True)


def _talk(conversations: "Sequence[Conversation]", console: Console) -> None:
    """Answers what the user types until /exit or Ctrl-D."""
    for text in _typed():
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            for conversation in conversations:
                conversation.reset()
            console.print("forgotten")
        elif text.startswith("/") and " " not in text:
            console.print(HELP)
        else:
            try:
                if len(conversations) > 1:
                    _side_by_side(conversations, text, console)
                else:
                    _stream(conversations[0], text, console)
            except OrchestratorError as error:  # such as a conversation that has grown too long
                console.print(f"error: {error}")


def _typed() -> Iterator[str]:
    """Lines from the terminal, with readline's keys if it is installed."""
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() its history and its keys)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text:
            yield text


def _stream(conversation: "Conversation", text: str, console: Console) -> None:
    answer = conversation.say(text, lambda words: console.print(words, end=""))
    console.print(CUT.get(answer.ended, ""))


def _side_by_side(conversations: "Sequence[Conversation]", text: str, console: Console) -> None:
    """Prints a table with one column per model, which fills as that model writes."""
    written = ["" for _ in conversations]

    def columns() -> Table:
        table = Table(expand=True, show_lines=False)
        for conversation in conversations:
            table.add_column(Text(conversation.name, overflow="fold"), ratio=1, overflow="fold")
        table.add_row(*(Text(words) for words in written))
        return table

    with Live(columns(), console=console, auto_refresh=False, transient=True) as live:

        def writer(index: int) -> Callable[[str], None]:
            def write(words: str) -> None:
                written[index] += words
                live.update(columns(), refresh=True)

            return write

        for index, conversation in enumerate(conversations):
            answer = conversation.say(text, writer(index))
            written[index] = answer.text + CUT.get(answer.ended, "")
    console.print(columns())

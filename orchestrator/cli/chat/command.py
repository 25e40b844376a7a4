"""`chat`: asks a trained model, and if asked for another one beside it, in a terminal or in a pipe.

Heavy imports happen inside the command, as in `cli`.
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

from orchestrator.core.errors import ConfigError, OrchestratorError

if TYPE_CHECKING:
    from orchestrator.cli.chat.conversation import Conversation

app = typer.Typer(add_completion=False)
HELP = "/reset forgets what was said, /exit (or Ctrl-D) ends, Ctrl-C ends an answer"
CUT = {"max_new_tokens": " …\n(cut: --max-new-tokens gives it more room)", "interrupted": " …\n(interrupted)"}


@app.command()
def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="a run folder, a model's or an adapter's folder, or ORG/NAME@REVISION"
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="RUN|MODEL", help="a second one beside it; `base`: what the run started from"),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="a system message before the conversation")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="answer this and end; again: each is a conversation of its own"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token, 1 draws as the model would")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="of what is drawn")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="an object per prompt and line")] = False,
) -> None:
    """Talks with a trained model. In a pipe each line of the input is a prompt, and a conversation of its
    own."""
    asked = prompt or None
    if asked is None and not sys.stdin.isatty():
        asked = (line.rstrip("\n") for line in sys.stdin if line.strip())
    if asked is None and as_json:
        raise ConfigError(
            "--json is for prompts, not for a conversation",
            fix="give --prompt TEXT, or prompts on the standard input",
        )
    console = Console(highlight=False, soft_wrap=True, markup=False)
    said = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    conversations, run_start = _open(model, against, system, (max_new_tokens, temperature, seed), said)
    if asked is not None:
        for text in asked:
            _answer_once(conversations, text, as_json, alone=prompt is not None and len(prompt) == 1)
        return
    said.print(
        f"{' and '.join(c.name for c in conversations)}. {HELP}."
        + ("" if against or not run_start else " --against base compares.")
    )
    _talk(conversations, console)


def _open(
    model: str, against: str | None, system: str | None, settings: tuple[int, float, int], said: Console
) -> "tuple[list[Conversation], bool]":
    """The conversations, and whether the first is with a run that has a start to be compared with. said: for
    notes."""
    from orchestrator.cli.chat.models import BASE, find

    first = find(model)  # a wrong name is told before anything heavy is read
    choices = [first]
    if against is not None:
        other = first.start if against == BASE and not Path(BASE).exists() else find(against)
        if other is None:
            raise ConfigError(
                f"--against base: {model} is no run",
                why="only a run knows what it started from",
                fix="name the other model's folder",
            )
        choices.append(other)
    with said.status("reading the weights") if said.is_terminal else nullcontext():
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
    for one in conversations:
        if not one.has_template:
            said.print(
                f"{one.name} has no chat template: texts are continued as they are, and nothing is remembered"
            )
    return conversations, first.start is not None


def _answer_once(conversations: "Sequence[Conversation]", text: str, as_json: bool, *, alone: bool) -> None:
    """One prompt, answered by each without a history. alone: the only one, so that the answer needs no
    heading."""
    answers = []
    for conversation in conversations:
        conversation.reset()
        answers.append(conversation.say(text, lambda words: None))
        if answers[-1].ended == "interrupted":
            sys.exit(128 + 2)
    if as_json:
        told = [{"model": c.name, **asdict(answer)} for c, answer in zip(conversations, answers, strict=True)]
        print(json.dumps({"prompt": text, "answers": told}, ensure_ascii=False), flush=True)
        return
    if not alone or len(answers) > 1:
        print(f"> {text}")
    for conversation, answer in zip(conversations, answers, strict=True):
        heading = f"[{conversation.name}] " if len(answers) > 1 else ""
        print(f"{heading}{answer.text}", flush=True)


def _talk(conversations: "Sequence[Conversation]", console: Console) -> None:
    """Until the user has enough."""
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
                _side_by_side(conversations, text, console) if len(conversations) > 1 else _stream(
                    conversations[0], text, console
                )
            except OrchestratorError as error:  # such as a conversation that has grown too long
                console.print(f"error: {error}")


def _typed() -> Iterator[str]:
    """Lines from the terminal, with the keys of readline where there is one."""
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
    """A column for each, which fills as its model writes; the whole table stays when all are done."""
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

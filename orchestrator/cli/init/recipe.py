"""A first recipe for somebody's model and data: values that fit, each with its reason.

Look (cli/init/look.py) --fit--> Fit --write--> recipe text (and reward.py, where GRPO has no answers to compare with) --save--> files
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from orchestrator.cli.init.look import Asked, Look
from orchestrator.core.errors import OutputError
from orchestrator.core.files import write_atomically

RATES = {"sft": "2e-5", "dpo": "1e-6", "lora-dpo": "2e-5", "reward": "1e-5", "grpo": "1e-6", "kto": "1e-6"}
ROUND = 64
"""data.max_length is a multiple of it."""
STEPS = 20
"""Optimizer steps that a pass over few rows is cut into, where they are enough."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Values that follow from the rows, and steps: of the whole run."""

    max_length: int
    effective: int
    epochs: int
    steps: int
    new_tokens: int


def fit(found: Look) -> Fit:
    """max_length: room for 99 rows of 100; effective: the usual one, or less where that makes too few steps."""
    most = found.positions or 1_000_000
    new_tokens = min(256, most // 2) if found.kind == "grpo" else 0
    length = min(-(-(found.quantile(0.99) + new_tokens) // ROUND) * ROUND, most)
    if found.kind == "grpo":
        prompts = min(8, found.rows)
        return Fit(length, prompts * 8, 1, max(1, found.rows // prompts), new_tokens)
    epochs = {"sft": 3 if found.rows < 1000 else 2, "reward": 1}.get(found.kind, 1)
    effective = 32
    while effective > 1 and found.rows * epochs // effective < STEPS:
        effective //= 2
    effective = min(max(effective, 4), found.rows)
    return Fit(length, effective, epochs, max(1, -(-found.rows * epochs // effective)), new_tokens)


def write(asked: Asked, found: Look, output: Path) -> dict[Path, str]:
    """Files by path: the recipe, and reward.py beside it where GRPO has nothing to compare with."""
    values, kind, files = fit(found), found.kind, dict[Path, str]()
    adapter = ["  lora: {rank: 16, alpha: 32, target_modules: all-linear}"] if kind == "lora-dpo" else []
    algorithm = f"{'dpo' if kind == 'lora-dpo' else kind}{', beta: 0.1' if kind in ('dpo', 'lora-dpo', 'kto') else ''}"
    blocks = [
        [
            f"# {kind} of {asked.model} on {asked.train}, written by `orchestrator init`: {found.why}.",
            f"# Format: {found.form}; {found.rows} rows. Paths are relative to the folder that commands are "
            "run in.",
            "run:",
            f"  name: {_name(output)}",
            f"  epochs: {values.epochs}  # {_passes(kind)}; {values.steps} "
            f"{'rollout batches' if kind == 'grpo' else 'optimizer steps'} in all",
        ],
        [
            "model:",
            f"  path: {_quoted(asked.model)}",
            *([f"  revision: {_quoted(asked.revision)}"] if asked.revision else []),
            *adapter,
        ],
        _data(asked, found, values),
        [f"algorithm: {{name: {algorithm}}}"],
        [
            "batch:",
            f"  effective: {values.effective}  # {_effective(found, values)}",
            "  micro_batch: auto  # found by a probe; changes no result",
        ],
        [
            "optimizer:",
            f"  learning_rate: {RATES[kind]}  # {_rate(kind)}",
            *(
                []
                if kind == "grpo"
                else ["  schedule: linear", "  warmup_ratio: 0.1  # of the run's optimizer steps"]
            ),
        ],
        [
            "learners:",
            "  workers: auto  # as many as there is room for; changes no result",
            "  gpus_per_worker: auto  # one where there are GPUs",
            "  precision: auto  # bf16 on GPUs that know it, fp32 on a CPU",
            *(
                ["  cpus_per_worker: 0.5  # a learner and a rollout actor take turns on one CPU, or one GPU"]
                if kind == "grpo"
                else []
            ),
        ],
        *(_rollouts(found, values, output, files) if kind == "grpo" else []),
    ]
    if asked.held_out:
        every = max(1, values.steps // 4)
        blocks.append(
            [f"evaluation: {{every: {every}}}  # four times in {values.steps} steps, and before the first"]
        )
    return {output: "\n\n".join("\n".join(block) for block in blocks) + "\n", **files}


def _data(asked: Asked, found: Look, values: Fit) -> list[str]:
    over = sum(n + values.new_tokens > values.max_length for n in found.lengths)
    quantiles = ", ".join(
        f"{name} {found.quantile(q)}" for name, q in (("median", 0.5), ("95 % below", 0.95), ("longest", 1.0))
    )
    what = "prompts" if found.kind == "grpo" else "rows"
    answer = f", and {values.new_tokens} for the answer" if values.new_tokens else ""
    cut = f"{over or 'none'} of {len(found.lengths)} {what} looked at {'are' if over > 1 else 'is'} longer"
    columns = ", ".join(f"{name}: {_quoted(theirs)}" for name, theirs in found.columns.items())
    return [
        "data:",
        f"  train: {_quoted(asked.train)}",
        f"  eval: {_quoted(asked.held_out)}"
        if asked.held_out
        else "  # eval: FILE  # held-out rows say whether it got better",
        *([f"  columns: {{{columns}}}"] if columns else []),
        f"  max_length: {values.max_length}  # tokens of {what}: {quantiles}{answer}; {cut}",
        "  overlong: truncate_prompt_left  # of conversations the oldest turns go, whole",
    ]


def _passes(kind: str) -> str:
    return {"sft": "passes over the demonstrations", "grpo": "each prompt once"}.get(
        kind, "pairs are learned by heart within two or three passes"
    )


def _effective(found: Look, values: Fit) -> str:
    if found.kind == "grpo":
        return f"completions in one step: {values.effective // 8} prompts with 8 answers each"
    fewer = "" if values.effective == 32 else f"; 32 are usual, and too many for {found.rows} rows"
    return f"examples in one optimizer step on any machine{fewer}"


def _rate(kind: str) -> str:
    return {
        "sft": "full fine-tune: 1e-5 to 2e-5 is usual, TRL's default is 2e-5",
        "dpo": "all weights of a pretrained model: 5e-7 to 1e-6 is usual, 1e-5 ruins it",
        "kto": "all weights of a pretrained model: 5e-7 to 1e-6 is usual, 1e-5 ruins it",
        "lora-dpo": "an adapter: 1e-5 to 2e-4, ten times that of all weights and more",
        "reward": "of the new head too; 1e-6 to 1e-5 is usual",
        "grpo": "TRL's and verl's default; 1e-5 ruins it",
    }[kind]


def _rollouts(found: Look, values: Fit, output: Path, files: dict[Path, str]) -> list[list[str]]:
    """The sections rollouts and rewards; where rows have no answer, a function of the user's own goes into
    `files`."""
    if found.has_answers:
        name = "last_number" if found.numbers else "exact_match"
        words = (
            "the last number of an answer is the row's"
            if found.numbers
            else "an answer is the row's, word for word"
        )
        component, why = f"{{name: correct, function: {name}}}", f"1 where {words} `answer`, else 0"
    else:
        file = output.parent / "reward.py"
        files[file] = REWARD
        component, why = (
            f"{{name: mine, function: {_quoted(f'{file}:reward')}}}",
            "rows have no answer to compare with: write what you want there",
        )
    rollouts = [
        "rollouts:",
        "  workers: auto  # one beside each learner",
        "  gpus_per_worker: auto",
        "  cpus_per_worker: 0.5",
        "  placement: colocated",
        f"  prompts: {values.effective // 8}",
        "  samples: 8  # TRL's default",
        f"  max_new_tokens: {values.new_tokens}",
    ]
    return [rollouts, ["rewards:", f"  functions: [{component}]  # {why}"]]


REWARD = '''"""The reward of a GRPO run: TRL's signature. Change it to what you want: whatever gets a higher number is what the model learns.

Try it on its own: python reward.py
"""


def reward(prompts, completions, **columns):
    """One number for each completion. A completion is text, or a list of messages where prompts are conversations; `columns` holds the
    other columns of the data, a value for each completion. This one likes answers of 5 to 50 words that end like a sentence."""
    scores = []
    for completion in completions:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        words = len(text.split())
        length = 1.0 if 5 <= words <= 50 else max(0.0, 1.0 - abs(words - 28) / 100)
        scores.append(length + 0.5 * text.rstrip().endswith((".", "!", "?")))
    return scores


if __name__ == "__main__":
    print(reward(["Say hello."], ["Hello, it is nice to meet you."]))
'''


def _quoted(text: str | None) -> str:
    """Text as a YAML value: plain where that is safe."""
    assert text is not None
    plain = text and all(c.isalnum() or c in "/._-" for c in text) and (text[0].isalpha() or text[0] in "/.")
    return (
        text
        if plain and text.lower() not in ("null", "true", "false", "yes", "no", "on", "off")
        else "'" + text.replace("'", "''") + "'"
    )


def _name(output: Path) -> str:
    """A run's name from the file's."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in output.stem).lstrip(
        "._-"
    )[:64]
    return name or "run"


def save(asked: Asked, found: Look, output: Path) -> list[Path]:
    """Writes the files and gives their paths. OutputError where one is there already; then none is written."""
    files = write(asked, found, output)
    for file in files:
        if file.exists():
            raise OutputError(
                f"{file} exists already",
                why="init overwrites nothing",
                fix="move it away, or choose another --output",
            )
    if not output.parent.is_dir():
        raise OutputError(
            f"there is no folder {output.parent}", fix=f"mkdir -p {shlex.quote(str(output.parent))}"
        )
    for file, text in files.items():
        write_atomically(file, text)
    return list(files)


def next_commands(found: Look, output: Path) -> list[str]:
    """What a user types now, each with what it is for."""
    recipe, name = shlex.quote(str(output)), _name(output)
    commands = [
        (f"orchestrator plan {recipe}", "what your machine decides, and what makes no sense"),
        (f"orchestrator inspect {recipe}", "the first batch, coloured by what is learned"),
        (f"orchestrator train {recipe}", f"writes runs/{name}: report.html, and export/, the model"),
    ]
    width = max(len(command) for command, _ in commands)
    return [f"{command:<{width}}  # {why}" for command, why in commands]

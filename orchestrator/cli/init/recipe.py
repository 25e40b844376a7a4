"""The recipe that `init` writes: values that fit the model and the data, each with its reason.

    DataProfile (cli/init/data_profile.py) --fit--> Fit --write--> recipe.yaml (and reward.py) --save--> files

reward.py is written for GRPO on rows without answers to compare with.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from orchestrator.cli.init.data_profile import DataProfile, InitRequest
from orchestrator.core.errors import OutputError
from orchestrator.core.files import write_atomically

RATES = {"sft": "2e-5", "dpo": "1e-6", "lora-dpo": "2e-5", "reward": "1e-5", "grpo": "1e-6", "kto": "1e-6"}
ROUND = 64
"""data.max_length is rounded up to a multiple of this."""
STEPS = 20
"""Optimizer steps that a run should have at least, if there are enough rows."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Values that follow from the rows."""

    max_length: int
    """Tokens; long enough for 99 of 100 rows."""
    effective: int
    """Examples of one optimizer step; less than the usual 32 if those would make too few steps."""
    epochs: int
    steps: int
    """Optimizer steps of the whole run; rollout batches for grpo."""
    new_tokens: int
    """Tokens of an answer that is sampled; 0 unless the kind is grpo."""


def fit(profile: DataProfile) -> Fit:
    """The values for these rows."""
    most = profile.positions or 1_000_000
    new_tokens = min(256, most // 2) if profile.kind == "grpo" else 0
    length = min(-(-(profile.quantile(0.99) + new_tokens) // ROUND) * ROUND, most)
    if profile.kind == "grpo":
        prompts = min(8, profile.rows)
        return Fit(length, prompts * 8, 1, max(1, profile.rows // prompts), new_tokens)
    epochs = {"sft": 3 if profile.rows < 1000 else 2, "reward": 1}.get(profile.kind, 1)
    effective = 32
    while effective > 1 and profile.rows * epochs // effective < STEPS:
        effective //= 2
    effective = min(max(effective, 4), profile.rows)
    return Fit(length, effective, epochs, max(1, -(-profile.rows * epochs // effective)), new_tokens)


def write(request: InitRequest, profile: DataProfile, output: Path) -> dict[Path, str]:
    """Text of each file: the recipe, and reward.py beside it if GRPO has no answers to compare with."""
    values = fit(profile)
    blocks = [
        _head(request, profile, values, output),
        _model(request, profile.kind),
        _data(request, profile, values),
        *_training(profile, values),
    ]
    needs_reward = profile.kind == "grpo" and not profile.has_answers
    reward = output.parent / "reward.py"
    if profile.kind == "grpo":
        blocks += _rollouts(profile, values, reward)
    if request.held_out:
        every = max(1, values.steps // 4)
        blocks.append(
            [f"evaluation: {{every: {every}}}  # four times in {values.steps} steps, and before the first"]
        )
    recipe = "\n\n".join("\n".join(block) for block in blocks) + "\n"
    return {output: recipe, reward: REWARD} if needs_reward else {output: recipe}


def _head(request: InitRequest, profile: DataProfile, values: Fit, output: Path) -> list[str]:
    unit = "rollout batches" if profile.kind == "grpo" else "optimizer steps"
    return [
        f"# {profile.kind} of {request.model} on {request.train}, "
        f"written by `orchestrator init`: {profile.why}.",
        f"# Format: {profile.form}; {profile.rows} rows. "
        "Paths are relative to the folder that commands are run in.",
        "run:",
        f"  name: {_name(output)}",
        f"  epochs: {values.epochs}  # {_passes(profile.kind)}; {values.steps} {unit} in all",
    ]


def _model(request: InitRequest, kind: str) -> list[str]:
    return [
        "model:",
        f"  path: {_quoted(request.model)}",
        *([f"  revision: {_quoted(request.revision)}"] if request.revision else []),
        *(["  lora: {rank: 16, alpha: 32, target_modules: all-linear}"] if kind == "lora-dpo" else []),
    ]


def _training(profile: DataProfile, values: Fit) -> list[list[str]]:
    """The sections algorithm, batch, optimizer and learners."""
    kind, online = profile.kind, profile.kind == "grpo"
    name = "dpo" if kind == "lora-dpo" else kind
    beta = ", beta: 0.1" if kind in ("dpo", "lora-dpo", "kto") else ""
    schedule = ["  schedule: linear", "  warmup_ratio: 0.1  # of the run's optimizer steps"]
    shared_cpu = "  cpus_per_worker: 0.5  # a learner and a rollout actor take turns on one CPU, or one GPU"
    return [
        [f"algorithm: {{name: {name}{beta}}}"],
        [
            "batch:",
            f"  effective: {values.effective}  # {_effective(profile, values)}",
            "  micro_batch: auto  # found by a probe; changes no result",
        ],
        [
            "optimizer:",
            f"  learning_rate: {RATES[kind]}  # {_rate(kind)}",
            *([] if online else schedule),
        ],
        [
            "learners:",
            "  workers: auto  # as many as there is room for; changes no result",
            "  gpus_per_worker: auto  # one if there are GPUs",
            "  precision: auto  # bf16 on GPUs that support it, fp32 on a CPU",
            *([shared_cpu] if online else []),
        ],
    ]


def _data(request: InitRequest, profile: DataProfile, values: Fit) -> list[str]:
    over = sum(n + values.new_tokens > values.max_length for n in profile.lengths)
    quantiles = ", ".join(
        f"{name} {profile.quantile(q)}"
        for name, q in (("median", 0.5), ("95 % below", 0.95), ("longest", 1.0))
    )
    what = "prompts" if profile.kind == "grpo" else "rows"
    answer = f", and {values.new_tokens} for the answer" if values.new_tokens else ""
    longer = (
        f"{over or 'none'} of {len(profile.lengths)} {what} measured {'are' if over > 1 else 'is'} longer"
    )
    columns = ", ".join(f"{name}: {_quoted(theirs)}" for name, theirs in profile.columns.items())
    return [
        "data:",
        f"  train: {_quoted(request.train)}",
        f"  eval: {_quoted(request.held_out)}"
        if request.held_out
        else "  # eval: FILE  # held-out rows show whether the model got better",
        *([f"  columns: {{{columns}}}"] if columns else []),
        f"  max_length: {values.max_length}  # tokens of {what}: {quantiles}{answer}; {longer}",
        "  overlong: truncate_prompt_left  # a conversation loses whole turns, the oldest first",
    ]


def _passes(kind: str) -> str:
    return {"sft": "passes over the demonstrations", "grpo": "each prompt once"}.get(
        kind, "pairs are memorised within two or three passes"
    )


def _effective(profile: DataProfile, values: Fit) -> str:
    if profile.kind == "grpo":
        return f"completions in one step: {values.effective // 8} prompts with 8 answers each"
    fewer = "" if values.effective == 32 else f"; 32 are usual, and too many for {profile.rows} rows"
    return f"examples in one optimizer step on any machine{fewer}"


def _rate(kind: str) -> str:
    return {
        "sft": "full fine-tune: 1e-5 to 2e-5 is usual, TRL's default is 2e-5",
        "dpo": "all weights of a pretrained model: 5e-7 to 1e-6 is usual, 1e-5 ruins it",
        "kto": "all weights of a pretrained model: 5e-7 to 1e-6 is usual, 1e-5 ruins it",
        "lora-dpo": "an adapter: 1e-5 to 2e-4, at least ten times the rate for all weights",
        "reward": "for all weights and the new head: 1e-6 to 1e-5 is usual",
        "grpo": "TRL's and verl's default; 1e-5 ruins it",
    }[kind]


def _rollouts(profile: DataProfile, values: Fit, reward: Path) -> list[list[str]]:
    """The sections rollouts and rewards; `reward` is the file that is named if rows have no answer."""
    if not profile.has_answers:
        component = f"{{name: mine, function: {_quoted(f'{reward}:reward')}}}"
        why = "rows have no answer to compare with: change the function to what you want"
    elif profile.numbers:
        component = "{name: correct, function: last_number}"
        why = "1 if the last number of an answer is the row's `answer`, else 0"
    else:
        component = "{name: correct, function: exact_match}"
        why = "1 if an answer is the row's `answer`, word for word, else 0"
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


REWARD = '''"""The reward of a GRPO run, with TRL's signature: the model learns what gets a higher number.

Change it to what you want, and try it: python reward.py
"""


def reward(prompts, completions, **columns):
    """One number for each completion.

    A completion is text, or a list of messages if prompts are conversations. `columns` holds the other
    columns of the data, one value for each completion. This example likes answers of 5 to 50 words that end
    like a sentence.
    """
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
    """Text as a YAML value: plain if that is safe, else quoted."""
    assert text is not None
    plain = text and all(c.isalnum() or c in "/._-" for c in text) and (text[0].isalpha() or text[0] in "/.")
    return (
        text
        if plain and text.lower() not in ("null", "true", "false", "yes", "no", "on", "off")
        else "'" + text.replace("'", "''") + "'"
    )


def _name(output: Path) -> str:
    """Name of the run, made from the recipe file's name."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in output.stem).lstrip(
        "._-"
    )[:64]
    return name or "run"


def save(request: InitRequest, profile: DataProfile, output: Path) -> list[Path]:
    """Writes the files and returns their paths. OutputError if one exists already; then none is written."""
    files = write(request, profile, output)
    for file in files:
        if file.exists():
            raise OutputError(
                f"{file} exists already",
                why="init overwrites nothing",
                fix="move it away, or choose another --output",
            )
    if not output.parent.is_dir():
        raise OutputError(
            f"the folder {output.parent} does not exist", fix=f"mkdir -p {shlex.quote(str(output.parent))}"
        )
    for file, text in files.items():
        write_atomically(file, text)
    return list(files)


def next_commands(profile: DataProfile, output: Path) -> list[str]:
    """The commands to run next, each with its purpose."""
    recipe, name = shlex.quote(str(output)), _name(output)
    commands = [
        (f"orchestrator plan {recipe}", "shows how your machine cuts the batch, and warns of unwise values"),
        (f"orchestrator inspect {recipe}", "shows the first batch, coloured by what is learned"),
        (f"orchestrator train {recipe}", f"writes runs/{name}: report.html, and the model in export/"),
    ]
    width = max(len(command) for command, _ in commands)
    return [f"{command:<{width}}  # {why}" for command, why in commands]

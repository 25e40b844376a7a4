"""Weights & Biases. Training and its result never depend on it: an outage costs at most two time limits and a note."""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config import Tracking
from orchestrator.observe.sample_cards import spread
from orchestrator.observe.sinks import Note
from orchestrator.records import EvaluationReport, Sample, StepReport

if TYPE_CHECKING:
    from wandb import Run

STEP = "train/global_step"
"""Our step metric. wandb's own step starts at 0 again when an offline run is resumed."""
TABLE_ROWS = 64
"""Rows of a table: each one logged becomes an artifact. All samples are in samples.jsonl."""


def stable_run_id(run_fingerprint: str, run_dir: Path) -> str:
    """The same id each time the same run goes on in the same folder, another one for a copy of it elsewhere."""
    return hashlib.sha256(f"{run_fingerprint}\n{run_dir.resolve()}".encode()).hexdigest()[:16]


class WandbSink:
    """Logs a run to wandb, online or offline. config: the resolved recipe; run_id: from stable_run_id."""

    def __init__(self, run_dir: Path, tracking: Tracking, run_name: str, config: Mapping[str, Any], run_id: str) -> None:
        assert tracking.wandb != "off", "no sink is made then"
        self._dir, self._tracking, self._name, self._config, self._id = run_dir, tracking, run_name, config, run_id
        self._run: Run | None = None
        self._taking = True
        self._rollouts: tuple[Sample, ...] = ()
        self._note: Note = _silent

    def open(self, note: Note) -> None:
        self._note = note
        self._dir.mkdir(parents=True, exist_ok=True)  # else wandb writes to the temporary folder of the machine
        self._run = self._start()
        self._guarded(_define_metrics)

    def step(self, report: StepReport) -> None:
        self._rollouts = report.samples
        self._guarded(lambda run: run.log({**report.metrics, STEP: report.step}))

    def evaluation(self, report: EvaluationReport) -> None:
        self._guarded(lambda run: run.log({**report.metrics, **_tables((*report.samples, *spread(self._rollouts, _reward))), STEP: report.step}))

    def note(self, message: str) -> None:
        """Notes are in logs/driver.log."""

    def close(self) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        limit = self._tracking.finish_timeout_s
        failure = failed_within(run.finish, limit + 2.0)  # wandb gives up by itself at `limit`; this is for when it does not
        if failure is not None:
            self._note(f"wandb did not finish ({_reason(failure)}); what it recorded is in {run.settings.sync_dir}")
            _release(limit)
        elif run.settings.mode == "offline":
            self._note(f"wandb: recorded offline, upload it with `wandb sync {run.settings.sync_dir}`")

    def _start(self) -> "Run | None":
        """An online run where that works, else an offline one, else none."""
        modes = ("online", "offline") if self._tracking.wandb == "online" else ("offline",)
        for mode in modes:
            try:
                return self._init(mode)
            except Exception as error:  # wandb has no common base class: mailbox, service and HTTP errors are plain ones
                instead = "recording offline instead" if mode == "online" else "this run is not tracked by wandb"
                self._note(f"wandb {mode} did not start ({_reason(error)}); {instead}")
                _release(self._tracking.finish_timeout_s)
        return None

    def _init(self, mode: str) -> "Run":
        import wandb

        tracking = self._tracking
        # init would ask for a key on the terminal and wait for ever
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise wandb.Error("no API key: run `wandb login` or set WANDB_API_KEY")
        return wandb.init(
            mode=mode,  # pyright: ignore[reportArgumentType]
            id=self._id,
            resume="allow",
            name=self._name,
            project=tracking.project,
            entity=tracking.entity,
            group=tracking.group,
            config=dict(self._config),
            dir=self._dir,
            reinit="create_new",  # never hand back the run of an earlier stage
            settings=wandb.Settings(
                init_timeout=tracking.init_timeout_s,
                finish_timeout=tracking.finish_timeout_s,
                silent=True,
                console="off",
                save_code=False,
                disable_code=True,
                disable_git=True,
            ),
        )

    def _guarded(self, act: "Callable[[Run], None]") -> None:
        """Tracks as long as that works; the first failure is noted and ends it."""
        if self._run is None or not self._taking:
            return
        try:
            act(self._run)
        except Exception as error:  # see _start
            self._taking = False
            self._note(f"wandb stopped taking metrics ({_reason(error)}); the run goes on, metrics.jsonl has all of them")


def failed_within(action: Callable[[], None], seconds: float) -> Exception | None:
    """Runs an action on a thread and waits so long: its failure, TimeoutError if it is still at it, None if it is done."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:  # handed to the caller
            failures.append(error)

    thread = threading.Thread(target=run, name="finish-tracking", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return TimeoutError(f"not done after {seconds:.0f} s")
    return failures[0] if failures else None


def _release(seconds: float) -> None:
    """Ends wandb's service process: it holds the id of a run that did not start or finish, and refuses a second try."""
    import wandb

    failed_within(wandb.teardown, seconds)


def _define_metrics(run: "Run") -> None:
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)


def _tables(samples: tuple[Sample, ...]) -> dict[str, Any]:
    from wandb import Table

    tables = {
        "eval/most_wrong_pairs": ("pair", ("prompt", "chosen", "rejected")),
        "eval/generations": ("generation", ("prompt", "completion", "answer")),
        "rollouts/worst_median_best": ("rollout", ("prompt", "completion", "answer", "version", "finish")),
    }
    logged = {}
    for name, (kind, texts) in tables.items():
        rows = [s for s in samples if s.kind == kind][:TABLE_ROWS]
        scores = list(dict.fromkeys(score for s in rows for score in s.scores))
        if rows:
            data: list[Any] = [[s.step, *(getattr(s, text) for text in texts), *(s.scores.get(score) for score in scores)] for s in rows]
            logged[name] = Table(columns=["step", *texts, *scores], data=data)
    return logged


def _reward(sample: Sample) -> float:
    return sample.scores.get("reward", 0.0)


def _reason(error: Exception) -> str:
    """The error in one line, without the key and without credentials of a proxy or server address."""
    line = next(iter(str(error).splitlines()), "")
    key = os.environ.get("WANDB_API_KEY")
    line = line.replace(key, "[key]") if key else line
    return f"{type(error).__name__}: {re.sub(r'://[^/@ ]+@', '://', line)}"


def _silent(message: str) -> None:
    """Before open there is nobody to tell."""

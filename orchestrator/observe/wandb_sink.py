"""The Weights & Biases sink. Training never depends on it: an outage costs at most two time limits and a
note."""

import hashlib
import math
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.core.files import is_evaluation, read_lines
from orchestrator.core.reports import EvaluationReport, Sample, StepReport
from orchestrator.observe.alerts import Alert
from orchestrator.observe.metric_names import grouped, unknown
from orchestrator.observe.report.samples import spread
from orchestrator.observe.sink import Note
from orchestrator.recipe.schema import Tracking

if TYPE_CHECKING:
    from wandb import Run

STEP = "train/global_step"
"""Our step metric. wandb's own step starts at 0 again when an offline run is resumed."""
EVALUATION_STEP = "eval/global_step"
"""Step of the last evaluation. A resumed run reads here which evaluations wandb has."""
SUMMARIES = {
    "reward/mean": "max,last",
    "memory/peak_gb": "max",
    "eval/loss": "min,last",
    **{
        f"eval/{name}": "max,last"
        for name in (
            "preference_accuracy",
            "logp_accuracy",
            "exact_match",
            "rewards/accuracies",
            "reward/mean",
            "pass@*",
        )
    },
}
"""Summary of a metric in the table of runs, where the last value alone is not enough."""
TABLE_ROWS = 64
"""Most rows of a table: wandb stores each logged table as an artifact. samples.jsonl has all samples."""
CREDENTIALS = re.compile(r"://[^/@ ]+@")


def stable_run_id(run_fingerprint: str, run_dir: Path) -> str:
    """A run id: the same whenever the run resumes in its folder, another one for a copy of the folder."""
    return hashlib.sha256(f"{run_fingerprint}\n{run_dir.resolve()}".encode()).hexdigest()[:16]


def apply_environment(tracking: Tracking, environment: Mapping[str, str]) -> tuple[Tracking, list[str]]:
    """(the recipe's section changed by wandb's own variables, lines for the user).

    WANDB_MODE may switch tracking off or keep it offline. WANDB_PROJECT counts if the recipe names no
    project. In all other cases the recipe wins, and a line reports it.
    """
    if tracking.wandb == "off":
        return tracking, []
    changes, notes = {}, []
    mode, project = environment.get("WANDB_MODE", ""), environment.get("WANDB_PROJECT", "")
    requested = {
        "disabled": "off",
        "dryrun": "offline",
        "offline": "offline",
        "online": "online",
        "run": "online",
    }.get(mode, tracking.wandb)
    order = ("off", "offline", "online")
    if order.index(requested) < order.index(tracking.wandb):
        changes["wandb"] = requested
        notes.append(f"WANDB_MODE={mode}: tracking.wandb is {requested} instead of {tracking.wandb}")
    elif requested != tracking.wandb:
        notes.append(f"WANDB_MODE={mode} is ignored: the recipe sets tracking.wandb={tracking.wandb}")
    if project and project != tracking.project and requested != "off":
        if tracking.project == Tracking.model_fields["project"].default:
            changes["project"] = project
            notes.append(f"WANDB_PROJECT={project}: tracking.project is {project}")
        else:
            notes.append(
                f"WANDB_PROJECT={project} is ignored: the recipe sets tracking.project={tracking.project}"
            )
    notes += [
        f"{name} is ignored: name and id come from the run's name and folder"
        for name in ("WANDB_NAME", "WANDB_RUN_ID")
        if environment.get(name)
    ]
    return tracking.model_copy(update=changes), notes


class WandbSink:
    """Logs a run to wandb, online or offline.

    config: the resolved recipe, the plan and versions; run_id: from stable_run_id; algorithm: job type and
    tag.

    metrics.jsonl is the truth. A resumed run first logs the rows that wandb lacks, and leaves out steps that
    are computed again after a crash if wandb has them. An offline run has no earlier rows: each start records
    all of them again, so the newest recording alone is the complete run.
    """

    def __init__(
        self,
        run_dir: Path,
        tracking: Tracking,
        run_name: str,
        config: Mapping[str, Any],
        run_id: str,
        algorithm: str | None = None,
    ) -> None:
        assert tracking.wandb != "off", "WandbSink needs tracking.wandb"
        self._dir, self._tracking, self._name, self._id = run_dir, tracking, run_name, run_id
        self._config, self._algorithm = without_credentials(config), algorithm
        self._run: Run | None = None
        self._logging = True
        self._logged = {STEP: -1, EVALUATION_STEP: -1}
        self._rollouts: tuple[Sample, ...] = ()
        self._note: Note = _silent

    def open(self, note: Note) -> None:
        self._note = note
        # if the folder is missing, wandb writes to the machine's temporary folder
        self._dir.mkdir(parents=True, exist_ok=True)
        self._run = self._start()
        self._guarded(_define_metrics)
        self._guarded(self._catch_up)

    def step(self, report: StepReport) -> None:
        self._rollouts = report.samples
        self._log(report.step, report.metrics)

    def evaluation(self, report: EvaluationReport) -> None:
        self._log(report.step, report.metrics, (*report.samples, *spread(self._rollouts, _reward)))

    def note(self, message: str) -> None:
        """Does nothing: logs/driver.log holds the notes."""

    def alert(self, alert: Alert) -> None:
        text = without_credentials(alert.text)  # an error may quote an address
        self._guarded(lambda run: run.alert(alert.title, text, level=alert.level, wait_duration=0))

    def close(self, *, failed: bool = False) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        limit = self._tracking.finish_timeout_s
        # wandb stops by itself at `limit`; two seconds more are for the case that it does not
        failure = failed_within(lambda: run.finish(exit_code=int(failed)), limit + 2.0)
        if failure is not None:
            self._note(
                f"wandb did not finish ({_reason(failure)}); what it recorded is in {run.settings.sync_dir}"
            )
            _release(limit)
        elif run.settings.mode == "offline":
            self._note(f"wandb: recorded offline, upload it with `wandb sync {run.settings.sync_dir}`")

    def _log(self, step: int, metrics: Mapping[str, float], samples: tuple[Sample, ...] = ()) -> None:
        """Logs one row, unless wandb has it from before a crash."""
        step_metric = EVALUATION_STEP if is_evaluation(metrics) else STEP
        if step > self._logged[step_metric]:
            row = {grouped(name): value for name, value in metrics.items() if not unknown(name, value)}
            self._guarded(lambda run: run.log({**row, **_tables(samples), STEP: step, step_metric: step}))

    def _catch_up(self, run: "Run") -> None:
        """Logs the rows of metrics.jsonl that wandb lacks."""
        self._logged = {name: int(run.summary.get(name, -1)) for name in self._logged}
        path = self._dir / "metrics.jsonl"
        for line in read_lines(path) if path.is_file() else ():
            metrics = {
                name: math.nan if value is None else value for name, value in line.items() if name != "step"
            }
            self._log(int(line.get("step", 0)), metrics)

    def _start(self) -> "Run | None":
        """Starts an online run; if that fails an offline one; if that fails none."""
        # WANDB_SERVICE names the service process of a parent, for example a notebook: the run would end with
        # it, or never start if that process has ended
        os.environ.pop("WANDB_SERVICE", None)
        modes = ("online", "offline") if self._tracking.wandb == "online" else ("offline",)
        for mode in modes:
            try:
                return self._init(mode)
            except Exception as error:  # wandb has no common base class of its errors
                instead = (
                    "recording offline instead" if mode == "online" else "this run is not tracked by wandb"
                )
                self._note(f"wandb {mode} did not start ({_reason(error)}); {instead}")
                _release(self._tracking.finish_timeout_s)
        return None

    def _init(self, mode: str) -> "Run":
        import wandb

        tracking = self._tracking
        # without a key wandb.init would wait for input on the terminal
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
            job_type=self._algorithm,
            tags=None if self._algorithm is None else [self._algorithm],
            config=self._config,
            dir=self._dir,
            reinit="create_new",  # never the run of an earlier stage
            settings=wandb.Settings(
                init_timeout=tracking.init_timeout_s,
                finish_timeout=tracking.finish_timeout_s,
                silent=True,
                console="off",
                save_code=False,
                disable_code=True,
                disable_git=True,
                # the command line and the environment's packages; versions are in the config
                x_disable_meta=True,
            ),
        )

    def _guarded(self, act: "Callable[[Run], None]") -> None:
        """Calls wandb. The first failure is noted and ends all logging."""
        if self._run is None or not self._logging:
            return
        try:
            act(self._run)
        except Exception as error:  # see _start
            self._logging = False
            self._note(
                f"wandb stopped taking metrics ({_reason(error)}); the run continues, and metrics.jsonl has "
                "all of them"
            )


def failed_within(action: Callable[[], None], seconds: float) -> Exception | None:
    """Runs an action on a thread, and waits for it at most `seconds`.

    Returns its exception, TimeoutError if it still runs, or None if it succeeded.
    """
    failures: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:  # returned to the caller
            failures.append(error)

    thread = threading.Thread(target=run, name="finish-tracking", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return TimeoutError(f"not done after {seconds:.0f} s")
    return failures[0] if failures else None


def _release(seconds: float) -> None:
    """Ends wandb's service process, which holds the id of a run that did not start or finish, and would
    refuse it a second time."""
    import wandb

    failed_within(wandb.teardown, seconds)


def _define_metrics(run: "Run") -> None:
    run.define_metric(STEP)
    run.define_metric(EVALUATION_STEP, hidden=True)
    run.define_metric("*", step_metric=STEP)
    for name, summary in SUMMARIES.items():
        run.define_metric(name, step_metric=STEP, summary=summary)


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
            data: list[Any] = [
                [s.step, *(getattr(s, text) for text in texts), *(s.scores.get(score) for score in scores)]
                for s in rows
            ]
            logged[name] = Table(columns=["step", *texts, *scores], data=data)
    return logged


def _reward(sample: Sample) -> float:
    return sample.scores.get("reward", 0.0)


def _reason(error: Exception) -> str:
    """The error in one line, without the API key and without credentials in addresses."""
    line = next(iter(str(error).splitlines()), "")
    key = os.environ.get("WANDB_API_KEY")
    line = line.replace(key, "[key]") if key else line
    return f"{type(error).__name__}: {CREDENTIALS.sub('://', line)}"


def without_credentials(value: Any) -> Any:
    """The values of a config without user names and passwords in addresses."""
    if isinstance(value, Mapping):
        return {name: without_credentials(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_credentials(inner) for inner in value]
    return CREDENTIALS.sub("://", value) if isinstance(value, str) else value


def _silent(message: str) -> None:
    """Stands in for the note function until open()."""

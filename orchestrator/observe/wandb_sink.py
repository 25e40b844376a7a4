"""Weights & Biases. Training and its result never depend on it: an outage costs at most two time limits and a
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
"""The step of the last evaluation; says to a resumed run which it need not log again."""
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
"""What the run table shows of a metric, where the last value does not say enough."""
TABLE_ROWS = 64
"""Rows of a table: each one logged becomes an artifact. All samples are in samples.jsonl."""
CREDENTIALS = re.compile(r"://[^/@ ]+@")


def stable_run_id(run_fingerprint: str, run_dir: Path) -> str:
    """The same id each time the same run goes on in the same folder, another one for a copy of it elsewhere."""
    return hashlib.sha256(f"{run_fingerprint}\n{run_dir.resolve()}".encode()).hexdigest()[:16]


def apply_environment(tracking: Tracking, environment: Mapping[str, str]) -> tuple[Tracking, list[str]]:
    """What wandb's own variables make of the recipe's section, and what to tell the user of it. WANDB_MODE
    may switch off or keep offline, and WANDB_PROJECT names a project where the recipe names none; the recipe
    wins else, which is told."""
    if tracking.wandb == "off":
        return tracking, []
    changes, told = {}, []
    mode, project = environment.get("WANDB_MODE", ""), environment.get("WANDB_PROJECT", "")
    wanted = {
        "disabled": "off",
        "dryrun": "offline",
        "offline": "offline",
        "online": "online",
        "run": "online",
    }.get(mode, tracking.wandb)
    order = ("off", "offline", "online")
    if order.index(wanted) < order.index(tracking.wandb):
        changes["wandb"] = wanted
        told.append(f"WANDB_MODE={mode}: tracking.wandb is {wanted} instead of {tracking.wandb}")
    elif wanted != tracking.wandb:
        told.append(f"WANDB_MODE={mode} is not followed: the recipe says tracking.wandb={tracking.wandb}")
    if project and project != tracking.project and wanted != "off":
        if tracking.project == Tracking.model_fields["project"].default:
            changes["project"] = project
            told.append(f"WANDB_PROJECT={project}: tracking.project is {project}")
        else:
            told.append(
                f"WANDB_PROJECT={project} is not followed: the recipe says "
                f"tracking.project={tracking.project}"
            )
    told += [
        f"{name} is not followed: the run's name and folder decide"
        for name in ("WANDB_NAME", "WANDB_RUN_ID")
        if environment.get(name)
    ]
    return tracking.model_copy(update=changes), told


class WandbSink:
    """Logs a run to wandb, online or offline. config: the resolved recipe and more; run_id: from
    stable_run_id; algorithm: its job type and tag.

    metrics.jsonl is the truth: where a run goes on, the rows of it that wandb does not have yet are logged
    first, and steps that are played again after a crash are left out if wandb has them. An offline run has no
    earlier rows, so each start records all of them again, and the newest recording alone is the whole run.
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
        assert tracking.wandb != "off", "no sink is made then"
        self._dir, self._tracking, self._name, self._id = run_dir, tracking, run_name, run_id
        self._config, self._algorithm = without_credentials(config), algorithm
        self._run: Run | None = None
        self._taking = True
        self._logged = {STEP: -1, EVALUATION_STEP: -1}
        self._rollouts: tuple[Sample, ...] = ()
        self._note: Note = _silent

    def open(self, note: Note) -> None:
        self._note = note
        self._dir.mkdir(
            parents=True, exist_ok=True
        )  # else wandb writes to the temporary folder of the machine
        self._run = self._start()
        self._guarded(_define_metrics)
        self._guarded(self._catch_up)

    def step(self, report: StepReport) -> None:
        self._rollouts = report.samples
        self._log(report.step, report.metrics)

    def evaluation(self, report: EvaluationReport) -> None:
        self._log(report.step, report.metrics, (*report.samples, *spread(self._rollouts, _reward)))

    def note(self, message: str) -> None:
        """Notes are in logs/driver.log."""

    def alert(self, alert: Alert) -> None:
        text = without_credentials(alert.text)  # an error may name the address that it came from
        self._guarded(lambda run: run.alert(alert.title, text, level=alert.level, wait_duration=0))

    def close(self, *, failed: bool = False) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        limit = self._tracking.finish_timeout_s
        # wandb gives up by itself at `limit`; the two seconds more are for when it does not
        failure = failed_within(lambda: run.finish(exit_code=int(failed)), limit + 2.0)
        if failure is not None:
            self._note(
                f"wandb did not finish ({_reason(failure)}); what it recorded is in {run.settings.sync_dir}"
            )
            _release(limit)
        elif run.settings.mode == "offline":
            self._note(f"wandb: recorded offline, upload it with `wandb sync {run.settings.sync_dir}`")

    def _log(self, step: int, metrics: Mapping[str, float], samples: tuple[Sample, ...] = ()) -> None:
        """One row, unless wandb has it from before a crash."""
        by = EVALUATION_STEP if is_evaluation(metrics) else STEP
        if step > self._logged[by]:
            row = {grouped(name): value for name, value in metrics.items() if not unknown(name, value)}
            self._guarded(lambda run: run.log({**row, **_tables(samples), STEP: step, by: step}))

    def _catch_up(self, run: "Run") -> None:
        """Brings wandb to where metrics.jsonl is."""
        self._logged = {name: int(run.summary.get(name, -1)) for name in self._logged}
        path = self._dir / "metrics.jsonl"
        for line in read_lines(path) if path.is_file() else ():
            metrics = {
                name: math.nan if value is None else value for name, value in line.items() if name != "step"
            }
            self._log(int(line.get("step", 0)), metrics)

    def _start(self) -> "Run | None":
        """An online run where that works, else an offline one, else none."""
        # names the service process of a parent, a notebook for one: the run would end with it, or never start
        # if it has ended
        os.environ.pop("WANDB_SERVICE", None)
        modes = ("online", "offline") if self._tracking.wandb == "online" else ("offline",)
        for mode in modes:
            try:
                return self._init(mode)
            except (
                Exception
            ) as error:  # wandb has no common base class: mailbox, service and HTTP errors are plain ones
                instead = (
                    "recording offline instead" if mode == "online" else "this run is not tracked by wandb"
                )
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
            job_type=self._algorithm,
            tags=None if self._algorithm is None else [self._algorithm],
            config=self._config,
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
                # the command line and the environment's packages; versions are in the config
                x_disable_meta=True,
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
            self._note(
                f"wandb stopped taking metrics ({_reason(error)}); the run goes on, metrics.jsonl has all "
                "of them"
            )


def failed_within(action: Callable[[], None], seconds: float) -> Exception | None:
    """Runs an action on a thread and waits so long: its failure, TimeoutError if it is still at it, None if
    it is done."""
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
    """Ends wandb's service process: it holds the id of a run that did not start or finish, and refuses a
    second try."""
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
    """The error in one line, without the key and without credentials of a proxy or server address."""
    line = next(iter(str(error).splitlines()), "")
    key = os.environ.get("WANDB_API_KEY")
    line = line.replace(key, "[key]") if key else line
    return f"{type(error).__name__}: {CREDENTIALS.sub('://', line)}"


def without_credentials(value: Any) -> Any:
    """A tree of config values whose addresses name no user and password."""
    if isinstance(value, Mapping):
        return {name: without_credentials(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_credentials(inner) for inner in value]
    return CREDENTIALS.sub("://", value) if isinstance(value, str) else value


def _silent(message: str) -> None:
    """Before open there is nobody to tell."""

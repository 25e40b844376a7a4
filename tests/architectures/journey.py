"""Runs one architecture through the program: a folder of random weights -> plan -> learner, its start-up
checks -> two SFT steps -> export -> reload.

    small(name) --save_pretrained--> folder --plan_run--> PlannedRun --RankLearner--> 2 steps
    2 steps --export_learner--> folder --from_pretrained--> log-probs

There is no Ray: one rank runs in this process, and all architectures share its process group. Each stage is
the program's own code.
"""

import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,  # pyright: ignore[reportPrivateImportUsage]
)

from orchestrator.core.errors import OrchestratorError
from orchestrator.data.micro_batches import cut_step, loss_units
from orchestrator.data.packing import pack
from orchestrator.learner.engine import ProcessGroup
from orchestrator.learner.export import export_learner
from orchestrator.learner.probes import final_weights
from orchestrator.learner.rank_learner import LearnerSpec, RankLearner
from orchestrator.learner.torch_baseline import PlainTrainer
from orchestrator.models.classes import auto_class
from orchestrator.models.tiny import byte_tokenizer
from orchestrator.models.unused import ROUTED
from orchestrator.plan.memory import fake_model
from orchestrator.recipe.schema import (
    AlgorithmConfig,
    Batch,
    Data,
    Learners,
    Model,
    Optimizer,
    Recipe,
    Run,
    Source,
)
from orchestrator.run.planned_run import PlannedRun, plan_run
from orchestrator.run.startup import check_layout, measured_throughput, probed_cut
from tests.architectures.shrink import small

STEPS = 2
GAP = 1e-4
"""Largest difference in nat of a token's log-prob between the learner and its export in transformers, both in
fp32."""
WEIGHTS = 5e-5
"""Largest relative difference of the weights after two steps from those of plain torch on the whole batch.
Rounding alone (fp32 against fp64) gives 1.8e-5 for gemma4, 1.1e-5 for deepseek_v4, 1.3e-6 for llama."""


UNFOLLOWED = (
    "blt",
    "dbrx",
    "gemma3n_text",
    "jetmoe",
    "longcat_flash",
    "qwen4_exp",
    "qwen4_exp_text",
    "reformer",
    "xlm",
    "xlnet",
    "xmod",
)
"""Architectures whose forward asks for values, which a model without storage does not have. The plan does not
know which of their parameters text never reaches, and reports it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one architecture."""

    name: str
    model_class: str
    verdict: str
    """Either "works", "refused" (in `plan`, by name), "no configuration" or "fault"."""
    stage: str
    """The last stage that ran."""
    why: str = ""
    """The refusal, or the error with its traceback."""
    plain: str = ""
    """For a refused one: the error of transformers' own forward and backward, or ""."""

    @property
    def row(self) -> str:
        """Row of the table in docs/models.md."""
        return (
            f"| {self.name} | {self.model_class} | {self.verdict} | "
            f"{self.why.splitlines()[0] if self.why else ''} |"
        )


class LocalGroup:
    """Replaces LearnerGroup, for one learner in this process."""

    def __init__(self, spec: LearnerSpec, group: ProcessGroup) -> None:
        self.spec, self._group = spec, group
        self.learner = RankLearner(spec, group, torch.device("cpu"))

    def build(self, spec: LearnerSpec) -> None:
        self.spec, self.learner = spec, RankLearner(spec, self._group, torch.device("cpu"))

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return [function(self.learner, *args)]


def recipe(folder: Path, **learners: Any) -> Recipe:
    """SFT on arithmetic, with defaults for everything else."""
    return Recipe(
        model=Model(path=str(folder)),
        data=Data(train=[Source(path="toy:sft", max_rows=16)], max_length=96),
        algorithm=AlgorithmConfig(name="sft"),
        batch=Batch(effective=4),
        optimizer=Optimizer(learning_rate=1e-3, weight_decay=0.1, schedule="constant"),
        learners=Learners(workers=1, **learners),
        run=Run(max_steps=STEPS),
    )


def make_folder(name: str, folder: Path) -> str:
    """Writes a small random model of the architecture with a byte tokenizer. Returns the class's name."""
    config = small(name)
    tokenizer = byte_tokenizer()
    config.get_text_config(decoder=True).pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = _class_of(config).from_config(config)
    model.save_pretrained(folder)
    return type(model).__name__


def _class_of(config: PretrainedConfig) -> Any:
    """The causal class, or the composite one if the causal one would write a configuration of its text alone
    that transformers does not read as a causal model."""
    readable = (
        type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        and type(config.get_text_config(decoder=True)) in MODEL_FOR_CAUSAL_LM_MAPPING
    )
    return AutoModelForCausalLM if readable else AutoModelForImageTextToText


def plain(folder: Path) -> str:
    """Error of transformers' own forward and backward in training mode on the CPU, or ""."""
    try:
        model = (
            _class_of(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).train()
        )
        ids = torch.from_numpy(np.random.default_rng(0).integers(10, 200, (2, 24)))
        logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def journey(name: str, work: Path, group: ProcessGroup, **learners: Any) -> Outcome:
    """The outcome of one architecture. work: a separate folder, which is removed afterwards."""
    stage, kind, unbuilt = "build", "", ""
    try:
        try:
            kind = make_folder(name, work / "model")
        except Exception as error:
            if not (work / "model" / "config.json").is_file():
                return Outcome(name, "", "no configuration", stage, f"{type(error).__name__}: {_line(error)}")
            # transformers cannot build it: then `plan` must refuse it
            unbuilt = f"{type(error).__name__}: {_line(error)}"
        stage = "plan"
        job = plan_run(recipe(work / "model", **learners), Console(quiet=True))
        stage = "learner"
        workers: Any = LocalGroup(LearnerSpec(job.recipe, job.plan.cut, STEPS), group)
        stage = "sizes"
        _check_sizes(job, workers.learner, name)
        stage = "checks"
        cut = probed_cut(job.plan, job.data, job.plan.cut, workers, lambda _: None)
        check_layout(job.recipe, job.algorithm, job.data, cut, workers, lambda _: None)
        measured_throughput(job.plan, job.algorithm, workers, lambda _: None)
        stage = "steps"
        steps = [job.data.batches.at(4 * i) for i in range(STEPS)]
        losses = []
        for number, groups in enumerate(steps):
            batch = cut_step(groups, cut)
            losses.append(workers.learner.forward_backward(batch.micro_batches[0], batch.units, number).loss)
            if not workers.learner.optim_step(number).applied:
                raise AssertionError(f"step {number} was refused")
        stage = "verify"
        _check_steps(job, workers.learner, steps, losses)
        stage = "export"
        export_learner(workers.learner, work / "export", "")
        stage = "reload"
        _check_export(workers.learner, job, work / "export")
    except OrchestratorError as error:
        reason = f"{error.what}: {error.why}".replace(str(work / "model"), "FOLDER")
        if stage != "plan":
            return Outcome(name, kind, "fault", stage, reason)
        return Outcome(name, kind, "refused", stage, reason, unbuilt or plain(work / "model"))
    except Exception as error:
        return Outcome(
            name, kind, "fault", stage, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Outcome(name, kind, "works", "reload", "")


def _check_sizes(job: PlannedRun, learner: RankLearner, kind: str) -> None:
    """The plan's model without storage must have the learner's parameters: the same ones tied, and the same
    ones frozen. Exceptions are routed parameters: from_pretrained makes some trainable that their class
    declares frozen (afmoe's bias of experts), whose gradient stays zero."""

    def sizes(model: torch.nn.Module) -> dict[str, tuple[int, bool]]:
        return {
            name: (p.numel(), p.requires_grad or kind in UNFOLLOWED or ROUTED in name)
            for name, p in model.named_parameters()
        }

    planned = sizes(
        fake_model(job.recipe, job.algorithm, FakeTensorMode(allow_non_fake_inputs=True)).hugging_face
    )
    learned = sizes(learner.scoring.hugging_face)
    if planned != learned:
        raise AssertionError(
            f"plan and learner differ in {sorted(dict(planned.items() ^ learned.items()))[:4]}"
        )


def _check_steps(
    job: PlannedRun, learner: RankLearner, steps: Sequence[Any], losses: Sequence[float]
) -> None:
    trainer = PlainTrainer(job.recipe, job.algorithm, STEPS)
    want = [trainer.step(groups, loss_units(groups), i).loss for i, groups in enumerate(steps)]
    if not np.allclose(losses, want, rtol=1e-5):
        raise AssertionError(f"losses {losses}, plain torch {want}")
    ours = {name.removeprefix("model."): w for name, w in final_weights(learner).items()}
    theirs = trainer.weights()
    distance = sum(float(np.square(ours[n] - w, dtype=np.float64).sum()) for n, w in theirs.items())
    size = sum(float(np.square(w, dtype=np.float64).sum()) for w in theirs.values())
    if not np.sqrt(distance / size) < WEIGHTS:
        worst = max(theirs, key=lambda n: float(np.abs(ours[n] - theirs[n]).max()))
        raise AssertionError(
            f"weights differ by {np.sqrt(distance / size):.1e} from plain torch, most in {worst}"
        )


def _check_export(learner: RankLearner, job: PlannedRun, folder: Path) -> None:
    model = (
        auto_class(AutoConfig.from_pretrained(folder), "lm")
        .from_pretrained(folder, dtype=torch.float32)
        .eval()
    )
    rows = pack(sorted(job.data.groups[:8], key=lambda g: g.longest)[:2], "padded")
    mask = torch.from_numpy((rows.segment >= 0).astype("int64"))
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(rows.input_ids), attention_mask=mask, use_cache=False
        ).logits.flatten(0, 1)
    logps = torch.log_softmax(logits[torch.from_numpy(rows.score_at)].float(), -1)
    want = logps.gather(1, torch.from_numpy(rows.targets)[:, None])[:, 0].numpy()
    gap = float(np.abs(learner.token_logprobs([rows])[0] - want).max())
    if not gap < GAP:
        raise AssertionError(f"the export gives other log-probs, by {gap:.1e} nat a token")

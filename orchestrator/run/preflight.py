"""Before anything is placed: does the cluster have what the run needs?

recipes --asked_by, look--> ClusterFacts      job --need_of--> Need      judge(facts, need) --require--> goes on, or every fix at once
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.cluster.doctor.facts import ClusterFacts, ClusterRequirements, ModelSource, NodeCapacity
from orchestrator.cluster.doctor.findings import Finding
from orchestrator.cluster.doctor.node import shared_folder, unmet_requirements, wandb_problem
from orchestrator.cluster.doctor.smoke import try_gpus_in_child
from orchestrator.cluster.doctor.survey import local_node_facts, on_cluster, survey
from orchestrator.core.errors import (
    ConfigError,
    Exit,
    MissingInput,
    NotEnoughResources,
    OrchestratorError,
    OutputError,
)
from orchestrator.plan.disk import checkpoint_bytes
from orchestrator.plan.hardware import visible_gpus
from orchestrator.recipe.pipeline import STAGE
from orchestrator.recipe.schema import ONLINE, Recipe
from orchestrator.run.planned_run import Job

HERE = "this machine"
ERRORS: dict[str, type[OrchestratorError]] = {
    "versions": ConfigError,
    "auth": ConfigError,
    "storage": OutputError,
    "disk": OutputError,
    "model": MissingInput,
}
"""What a failed check raises; all others NotEnoughResources."""


def need_of(job: Job) -> ClusterRequirements:
    """What a planned run asks of the cluster."""
    recipe = job.recipe
    return replace(
        asked_by([recipe]),
        groups=(*job.demands(), *job.reward_models()),
        checkpoint_bytes=checkpoint_bytes(job.recipe, job.algorithm, job.sizes()),
        keep=recipe.checkpoint.keep,
        wandb=recipe.tracking.wandb,
        object_store=job.store_bytes(),
    )


def model_sources(recipe: Recipe) -> tuple[ModelSource, ...]:
    """The weights that workers load, each once: folders, or ORG/NAME on the hub."""
    wanted = [(m.path, m.revision) for m in (recipe.model, recipe.critic.model) if m is not None]
    wanted += [(recipe.model.reference, None), *((f.model, f.revision) for f in recipe.rewards.functions)]
    return tuple(
        ModelSource(path, revision, _on_hub(path))
        for path, revision in dict.fromkeys(wanted)
        if path is not None
    )


def _on_hub(path: str) -> bool:
    """As models/load.py takes a name that is no folder here."""
    return not Path(path).is_dir() and not path.startswith(("/", ".")) and path.count("/") == 1


def look(asked: ClusterRequirements, root: Path | None = None, *, kernels: bool = False) -> ClusterFacts:
    """What there is on the cluster of RAY_ADDRESS, node by node; without one on this machine, without
    starting Ray. root: the run folder; None leaves storage and disk out; kernels: try the GPUs of this
    machine too, which takes some seconds. No wait is longer than the deadlines in cluster/doctor/survey.py.
    """
    # before a plan GPUs are of interest wherever there are some
    facts = (
        survey(root, asked.models, asked.libraries, gpus=asked.gpus or not asked.groups)
        if on_cluster()
        else this_machine(asked, root)
    )
    if kernels and not on_cluster() and facts.nodes[0].devices:
        facts = replace(facts, nodes=(replace(facts.nodes[0], kernels=try_gpus_in_child()),))
    return replace(facts, wandb=wandb_problem()) if asked.wandb == "online" else facts


def asked_by(recipes: Sequence[Recipe]) -> ClusterRequirements:
    """What is known of runs before they are planned: the weights they load (not those that a stage will
    make), and wandb."""
    models = dict.fromkeys(
        m for recipe in recipes for m in model_sources(recipe) if not m.path.startswith(STAGE)
    )
    vllm = any(recipe.algorithm.name in ONLINE and recipe.rollouts.engine == "vllm" for recipe in recipes)
    online = any(recipe.tracking.wandb == "online" for recipe in recipes)
    return ClusterRequirements(
        models=tuple(models), wandb="online" if online else "off", libraries=("vllm",) if vllm else ()
    )


def this_machine(need: ClusterRequirements, root: Path | None) -> ClusterFacts:
    """What a Ray started here would have."""
    folder = str(shared_folder(root)) if root is not None else None
    facts = local_node_facts(HERE, "127.0.0.1", folder, need.models, need.libraries)
    has = NodeCapacity(HERE, float(os.cpu_count() or 1), float(len(visible_gpus())))
    auth = (
        os.environ.get("RAY_AUTH_MODE", "token") == "token"
    )  # Ray turns it on by itself for one that it starts here
    return ClusterFacts((facts,), (has,), unmet=unmet_requirements(), auth=auth, skipped="there is one node")


def exit_code(findings: Sequence[Finding]) -> Exit:
    """Of the first error; 0 without one."""
    errors = [f.check for f in findings if f.level == "error"]
    return _kind(errors[0]).exit_code if errors else Exit.OK


def _kind(check: str) -> type[OrchestratorError]:
    return ERRORS.get(check, NotEnoughResources)


def require(findings: Sequence[Finding]) -> None:
    """Raises what the first error is, with the exit code of its kind; all errors and their fixes are in the
    message."""
    errors = [f for f in findings if f.level == "error"]
    if not errors:
        return
    kind = _kind(errors[0].check)
    if len(errors) == 1:
        raise kind(f"{errors[0].where}: {errors[0].what}", fix=errors[0].fix)
    lines = [f"{f.check}: {f.where}: {f.what}\n       fix: {f.fix}" for f in errors]
    what = f"the cluster is not ready for this run: {len(errors)} errors"
    raise kind(what, why="\n       ".join(lines), fix="mend them, then look again with `orchestrator doctor`")

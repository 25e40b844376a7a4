"""Checks, before anything is placed, that the cluster has what the run needs.

recipes    --recipe_requirements--> ClusterRequirements --cluster_facts--> ClusterFacts -+
PlannedRun --run_requirements--> ClusterRequirements ------------------------------------+
                                                                                         |
the run starts, or one error with every fix <--require-- findings <--check_cluster-------+
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
from orchestrator.core import hub
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
from orchestrator.run.planned_run import PlannedRun

HERE = "this machine"
ERRORS: dict[str, type[OrchestratorError]] = {
    "versions": ConfigError,
    "auth": ConfigError,
    "storage": OutputError,
    "disk": OutputError,
    "model": MissingInput,
}
"""Error that a failed check raises, by the check's name; NotEnoughResources for all others."""


def run_requirements(planned: PlannedRun) -> ClusterRequirements:
    """Requirements of a planned run."""
    recipe = planned.recipe
    return replace(
        recipe_requirements([recipe]),
        groups=(*planned.demands(), *planned.reward_models()),
        checkpoint_bytes=checkpoint_bytes(planned.recipe, planned.algorithm, planned.sizes()),
        keep=recipe.checkpoint.keep,
        wandb=recipe.tracking.wandb,
        object_store=planned.store_bytes(),
    )


def model_sources(recipe: Recipe) -> tuple[ModelSource, ...]:
    """The weights that workers load, each once: a folder, or ORG/NAME on the hub."""
    wanted = [(m.path, m.revision) for m in (recipe.model, recipe.critic.model) if m is not None]
    wanted += [(recipe.model.reference, None), *((f.model, f.revision) for f in recipe.rewards.functions)]
    return tuple(
        ModelSource(path, revision, hub.is_model_name(path))
        for path, revision in dict.fromkeys(wanted)
        if path is not None
    )


def cluster_facts(
    need: ClusterRequirements, root: Path | None = None, *, kernels: bool = False
) -> ClusterFacts:
    """Facts of each node of the cluster at RAY_ADDRESS; if it is not set, of this machine, without Ray.

    root: the run folder, None to skip storage and disk; kernels: also tries the GPUs of this machine, which
    takes some seconds. No wait is longer than the deadlines in cluster/doctor/survey.py.
    """
    # before a plan (no groups yet) GPUs are looked at wherever a node has some
    facts = (
        survey(root, need.models, need.libraries, gpus=need.gpus or not need.groups)
        if on_cluster()
        else this_machine(need, root)
    )
    if kernels and not on_cluster() and facts.nodes[0].devices:
        facts = replace(facts, nodes=(replace(facts.nodes[0], kernels=try_gpus_in_child()),))
    return replace(facts, wandb=wandb_problem()) if need.wandb == "online" else facts


def recipe_requirements(recipes: Sequence[Recipe]) -> ClusterRequirements:
    """Requirements that are known before runs are planned: vLLM, wandb, and the weights they load.

    Weights that a stage will export are left out.
    """
    models = dict.fromkeys(
        m for recipe in recipes for m in model_sources(recipe) if not m.path.startswith(STAGE)
    )
    vllm = any(recipe.algorithm.name in ONLINE and recipe.rollouts.engine == "vllm" for recipe in recipes)
    online = any(recipe.tracking.wandb == "online" for recipe in recipes)
    return ClusterRequirements(
        models=tuple(models), wandb="online" if online else "off", libraries=("vllm",) if vllm else ()
    )


def this_machine(need: ClusterRequirements, root: Path | None) -> ClusterFacts:
    """Facts of this machine, as a Ray started here would see it."""
    folder = str(shared_folder(root)) if root is not None else None
    facts = local_node_facts(HERE, "127.0.0.1", folder, need.models, need.libraries)
    capacity = NodeCapacity(HERE, float(os.cpu_count() or 1), float(len(visible_gpus())))
    # Ray turns authentication on by itself if it starts here
    auth = os.environ.get("RAY_AUTH_MODE", "token") == "token"
    return ClusterFacts(
        (facts,), (capacity,), unmet=unmet_requirements(), auth=auth, skipped="there is one node"
    )


def exit_code(findings: Sequence[Finding]) -> Exit:
    """Exit code of the first error; 0 without errors."""
    errors = [f.check for f in findings if f.level == "error"]
    return _kind(errors[0]).exit_code if errors else Exit.OK


def _kind(check: str) -> type[OrchestratorError]:
    return ERRORS.get(check, NotEnoughResources)


def require(findings: Sequence[Finding]) -> None:
    """Raises an error of the first error's kind. Its message holds all errors and their fixes."""
    errors = [f for f in findings if f.level == "error"]
    if not errors:
        return
    kind = _kind(errors[0].check)
    if len(errors) == 1:
        raise kind(f"{errors[0].where}: {errors[0].what}", fix=errors[0].fix)
    lines = [f"{f.check}: {f.where}: {f.what}\n       fix: {f.fix}" for f in errors]
    what = f"the cluster is not ready for this run: {len(errors)} errors"
    raise kind(what, why="\n       ".join(lines), fix="fix them, then check again with `orchestrator doctor`")

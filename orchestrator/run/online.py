"""One start of an online run: builds the live objects of a recipe, runs the loop over them, exports.

plan --learners, critic--> policy --weight sync--> rollout actors --reward pool--> OnlineTrainer --> export
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from orchestrator.algorithms.table import critic as value_model
from orchestrator.cluster.in_process import LocalRank, LocalRewards, LocalRollouts
from orchestrator.cluster.joining import connect, store_for
from orchestrator.cluster.learner_group import LearnerGroup
from orchestrator.cluster.placement import Reservation, reserved
from orchestrator.cluster.ranks import Ranks
from orchestrator.cluster.reward_pool import RewardPool
from orchestrator.cluster.rollout_pool import RolloutPool
from orchestrator.cluster.weight_sync import make_weight_sync
from orchestrator.core.batches import Cut, PackedBatch
from orchestrator.core.reports import Progress
from orchestrator.core.roles import Generator, Learner, Scorer, WeightSync
from orchestrator.core.rollouts import Sampling
from orchestrator.core.stopping import Stop
from orchestrator.learner.probes import model_fingerprint
from orchestrator.learner.rank_learner import LearnerSpec
from orchestrator.observe.phases import phase
from orchestrator.observe.reporter import RunReporter
from orchestrator.observe.timeline import Timeline
from orchestrator.plan.memory import model_sizes
from orchestrator.recipe.schema import Learners, Recipe, Rollouts
from orchestrator.rollout.replay import NoSync, Replay
from orchestrator.run.checkpoints import CheckpointStore, RunCheckpoints
from orchestrator.run.export import export_policy
from orchestrator.run.folder import RunFolder
from orchestrator.run.planned_run import PlannedRun
from orchestrator.run.startup import check_layout, probed_cut
from orchestrator.trainers.experience import ExperienceInputs
from orchestrator.trainers.online import OnlinePlan, OnlineTrainer, TrainedRoles
from orchestrator.trainers.online_evaluation import RolloutEvaluator
from orchestrator.trainers.optimizer_step import Attach, Guards, OptimizerStepper


def run_once(planned: PlannedRun, folder: RunFolder, cut: Cut, stop: Stop) -> Progress:
    """Runs from the newest checkpoint to the end, or until a worker is lost."""
    recipe, online = planned.recipe, planned.algorithm.online
    assert online is not None and planned.prompts is not None
    store = CheckpointStore(
        folder.checkpoints, run=folder.fingerprint, keep=recipe.checkpoint.keep, note=planned.console.print
    )
    saved = store.newest()
    with ExitStack() as stack:
        reporter = stack.enter_context(planned.reporter(folder, saved.progress.step if saved else 0))
        parts = _in_process(planned, stack) if planned.in_process else _on_ray(planned, folder, stack)
        group, critic = parts.policy, parts.critic
        cut = _build(planned, cut, parts, reporter.note)
        with phase(planned.console, "starting rollout actors and rewards"):
            generator, scorer, weight_sync = parts.start_rollouts()
        trained = [group] if critic is None else [group, critic]
        sampling = sampling_of(recipe)
        base = group.call(model_fingerprint)[0]
        checkpoints = RunCheckpoints(
            store, trained, saved, base, final=recipe.checkpoint.final, last=planned.plan.total_steps
        )
        evaluated = saved is not None and folder.evaluated(saved.progress.step)
        trainer = OnlineTrainer(
            plan=_loop_plan(planned, sampling, evaluated),
            learning=_trained_roles(planned, cut, group, critic, reporter),
            prompts=planned.prompts.batches,
            generator=generator,
            scorer=scorer,
            weights=weight_sync,
            evaluator=RolloutEvaluator(_held_out(planned), recipe.evaluation, sampling, generator, scorer),
            report=reporter,
            checkpoints=checkpoints,
            timeline=Timeline(folder.root / "trace.json"),
            stop=stop,
        )
        progress = trainer.run()
        stop.doing = "exporting the model"
        export_policy(planned, folder, group, reporter.note)
        if critic is not None and recipe.critic.export:
            critic.export(folder.critic_export, planned.card(folder))
        folder.mark_done(progress.step)
        checkpoints.finish()
        return progress


RolloutParts = tuple[Generator, Scorer, WeightSync]


@dataclass(frozen=True, slots=True)
class Parts:
    """The live objects of one start. The learners hold no model yet."""

    policy: Ranks
    critic: Ranks | None
    start_rollouts: Callable[[], RolloutParts]
    """Starts the rollout actors and rewards. Call it when the learners hold their models."""


def _build(planned: PlannedRun, cut: Cut, parts: Parts, note: Callable[[str], None]) -> Cut:
    """Loads the models into the learners and checks them; returns the cut that fits into their memory."""
    recipe, critic = planned.recipe, parts.critic
    with phase(planned.console, "loading the model"):
        parts.policy.build(LearnerSpec(recipe, cut, planned.schedule_steps))
    with phase(planned.console, "checking memory and layout"):
        cut = probed_cut(planned.plan, planned.data, cut, parts.policy, note)
        check_layout(recipe, planned.algorithm, planned.data, cut, parts.policy, note)
    if critic is not None:
        critic_cut = replace(cut, workers=critic.world)
        critic.build(LearnerSpec(critic_recipe(recipe), critic_cut, planned.schedule_steps, "critic"))
    return cut


def _on_ray(planned: PlannedRun, folder: RunFolder, stack: ExitStack) -> Parts:
    """Ray workers and actors, in resources that are reserved for all of them together."""
    recipe, parameters, logs = planned.recipe, planned.sizes().all, folder.logs
    with phase(planned.console, "starting Ray"):
        connect(store_for(planned.store_bytes()))
    with phase(planned.console, "starting workers"):
        placed = stack.enter_context(
            reserved((*planned.demands(), *planned.reward_models()), recipe.learners.start_timeout_s)
        )
        learners, colocated = recipe.learners, colocated_rollouts(recipe)
        policy = stack.enter_context(
            LearnerGroup(
                learners,
                parameters=parameters,
                logs=logs,
                colocated=colocated,
                reservation=placed["learners"],
            )
        )
        critic = stack.enter_context(_critic_group(planned, folder, placed)) if _has_critic(planned) else None

    def start_rollouts() -> RolloutParts:
        scorer = stack.enter_context(
            RewardPool(recipe.rewards, model_for_tokenizer=recipe.model, logs=logs, reservations=placed)
        )
        pool = stack.enter_context(
            RolloutPool(recipe, parameters=parameters, logs=logs, reservation=rollout_reservation(placed))
        )
        return pool, scorer, make_weight_sync(recipe, policy, pool)

    return Parts(policy, critic, _replay(recipe) or start_rollouts)


def _in_process(planned: PlannedRun, stack: ExitStack) -> Parts:
    """Learner, generator and rewards in this process."""
    recipe = planned.recipe
    policy = stack.enter_context(LocalRank(recipe.learners))
    critic = stack.enter_context(LocalRank(critic_recipe(recipe).learners)) if _has_critic(planned) else None

    def start_rollouts() -> RolloutParts:
        local = LocalRollouts(recipe, policy)
        return local, LocalRewards(recipe.rewards, recipe.model), local

    return Parts(policy, critic, _replay(recipe) or start_rollouts)


def _has_critic(planned: PlannedRun) -> bool:
    return planned.algorithm.online is not None and planned.algorithm.online.critic


def _replay(recipe: Recipe) -> Callable[[], RolloutParts] | None:
    """The recording that replaces actors and rewards; None without rollouts.replay."""
    if recipe.rollouts.replay is None:
        return None
    replay = Replay.read(recipe.rollouts.replay)
    return lambda: (replay, replay, NoSync())


def colocated_rollouts(recipe: Recipe) -> Rollouts | None:
    """The rollouts section if rollout actors share the learners' GPUs, else None."""
    rollouts = recipe.rollouts
    return rollouts if rollouts.placement == "colocated" and rollouts.replay is None else None


def rollout_reservation(placed: Mapping[str, Reservation]) -> Reservation:
    """Reservation of the rollout actors: the learners' bundles if they are colocated."""
    return placed.get("rollouts", placed["learners"])


def critic_recipe(recipe: Recipe) -> Recipe:
    """The recipe of PPO's value model: its own model, learning rate and workers, else the policy's keys."""
    critic = recipe.critic
    optimizer = recipe.optimizer.model_copy(
        update={"learning_rate": critic.learning_rate or recipe.optimizer.learning_rate}
    )
    sizes = {
        "workers": critic.workers,
        "gpus_per_worker": critic.gpus_per_worker,
        "cpus_per_worker": critic.cpus_per_worker,
    }
    learners: Learners = recipe.learners.model_copy(update=sizes)
    model = critic.model or recipe.model.model_copy(update={"lora": None, "reference": None})
    return recipe.model_copy(update={"model": model, "optimizer": optimizer, "learners": learners})


def _critic_group(planned: PlannedRun, folder: RunFolder, placed: Mapping[str, Reservation]) -> LearnerGroup:
    recipe = critic_recipe(planned.recipe)
    parameters = model_sizes(recipe, value_model(recipe.algorithm)).all
    return LearnerGroup(
        recipe.learners, parameters=parameters, logs=folder.logs, name="critic", reservation=placed["critic"]
    )


def _trained_roles(
    planned: PlannedRun, cut: Cut, group: Ranks, critic: Ranks | None, reporter: RunReporter
) -> TrainedRoles:
    policy = OptimizerStepper(
        planned.algorithm, group, cut, live_reference(planned, group), reporter, planned.guards()
    )
    if critic is None:
        return TrainedRoles(policy)
    # the policy's first loss and its predicted traffic are no limits of the critic
    values = OptimizerStepper(
        planned.algorithm, critic, replace(cut, workers=critic.world), lambda batch: batch, reporter, Guards()
    )
    return TrainedRoles(policy, values)


def live_reference(planned: PlannedRun, group: Learner) -> Attach:
    """Adds live reference log-probs to pairs of online DPO. Policy gradients have theirs in `Experience`."""
    online = planned.algorithm.online
    if online is None or online.advantage is not None or not planned.algorithm.needs_reference:
        return lambda batch: batch

    def attach(batch: PackedBatch) -> PackedBatch:
        return batch.with_reference(group.token_logprobs(batch, reference=True))

    return attach


def sampling_of(recipe: Recipe) -> Sampling:
    """Sampling parameters of a recipe's completions."""
    rollouts = recipe.rollouts
    return Sampling(
        samples=rollouts.samples,
        max_new_tokens=rollouts.max_new_tokens,
        temperature=rollouts.temperature,
        top_p=rollouts.top_p,
        top_k=rollouts.top_k,
        min_p=rollouts.min_p,
        stop=tuple(rollouts.stop),
        seed=recipe.run.seed,
    )


def experience_inputs(planned: PlannedRun) -> ExperienceInputs:
    """What the advantages of its rollouts are computed from."""
    return _loop_plan(planned, sampling_of(planned.recipe), evaluated=False).needs


def _loop_plan(planned: PlannedRun, sampling: Sampling, evaluated: bool) -> OnlinePlan:
    recipe = planned.recipe
    algorithm = recipe.algorithm
    return OnlinePlan(
        algorithm=planned.algorithm,
        seed=recipe.run.seed,
        total_steps=planned.plan.total_steps,
        mini_batch=recipe.batch.effective // planned.algorithm.group_examples,
        epochs=algorithm.epochs,
        optimizer_steps=planned.optimizer_steps,
        sampling=sampling,
        dropout=recipe.model.lora is not None and recipe.model.lora.dropout > 0,
        max_staleness=recipe.rollouts.max_staleness,
        max_resampled=algorithm.max_resampled,
        mask_truncated=algorithm.mask_truncated,
        kl=algorithm.kl,
        gap_warning=algorithm.correction.alarm,
        normalise_rewards=recipe.rewards.normalise == "running",
        critic_warmup=recipe.critic.warmup_steps,
        evaluate_every=recipe.evaluation.every,
        evaluate_at_start=recipe.evaluation.at_start,
        save_every=recipe.checkpoint.steps,
        save_after_s=recipe.checkpoint.seconds,
        evaluated=evaluated,
        sources=planned.data.loaded.names,
    )


def _held_out(planned: PlannedRun) -> tuple:
    """Held-out prompts; none with rollouts.replay, which has no actor that could answer them."""
    assert planned.prompts is not None
    return () if planned.recipe.rollouts.replay is not None else planned.prompts.held_out


def evaluate(planned: PlannedRun) -> dict[str, float]:
    """Held-out rewards of the recipe's model, untrained. The learners only load and publish its weights."""
    assert planned.prompts is not None
    recipe = planned.recipe
    with ExitStack() as stack:
        connect(store_for(planned.store_bytes()))
        groups = [g for g in (*planned.demands(), *planned.reward_models()) if g.what != "critic"]
        placed = stack.enter_context(reserved(groups, recipe.learners.start_timeout_s))
        parameters = planned.sizes().all
        learners, colocated = recipe.learners, colocated_rollouts(recipe)
        group = stack.enter_context(
            LearnerGroup(learners, parameters=parameters, colocated=colocated, reservation=placed["learners"])
        )
        group.build(LearnerSpec(recipe, planned.plan.cut, 1))
        scorer = stack.enter_context(
            RewardPool(recipe.rewards, model_for_tokenizer=recipe.model, logs=None, reservations=placed)
        )
        pool = stack.enter_context(
            RolloutPool(recipe, parameters=parameters, reservation=rollout_reservation(placed))
        )
        make_weight_sync(recipe, group, pool).publish(0)
        return dict(
            RolloutEvaluator(planned.prompts.held_out, recipe.evaluation, sampling_of(recipe), pool, scorer)
            .evaluate(0)
            .metrics
        )

"""One attempt at an online run: the live objects of a recipe, and the loop over them.

plan --learners, critic--> policy --bridge--> rollout actors --reward pool--> OnlineTrainer --> export
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from orchestrator.algorithms.table import critic as value_model
from orchestrator.cluster.in_process import LocalRank, LocalRewards, LocalRollouts
from orchestrator.cluster.joining import connect, store_for
from orchestrator.cluster.learner_group import LearnerGroup
from orchestrator.cluster.placement import Placement, reserved
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
from orchestrator.models.rounding import widened
from orchestrator.observe.phases import phase
from orchestrator.observe.reporter import RunReporter
from orchestrator.observe.timeline import Timeline
from orchestrator.plan.memory import model_sizes
from orchestrator.recipe.schema import Learners, Recipe, Rollouts
from orchestrator.rollout.replay import NoSync, Replay
from orchestrator.run.checkpoints import CheckpointStore
from orchestrator.run.folder import RunFolder
from orchestrator.run.planned_run import Job
from orchestrator.run.resume import RunCheckpoints
from orchestrator.run.startup import check_layout, probed_cut
from orchestrator.trainers.online import OnlinePlan, OnlineTrainer, TrainedRoles
from orchestrator.trainers.online_evaluation import RolloutEvaluator
from orchestrator.trainers.optimizer_step import Attach, Guards, OptimizerStepper


def run_once(job: Job, folder: RunFolder, cut: Cut, stop: Stop) -> Progress:
    """Runs from the newest checkpoint to the end, or until a worker is lost."""
    recipe, online = job.recipe, job.algorithm.online
    assert online is not None and job.prompts is not None
    store = CheckpointStore(
        folder.checkpoints, run=folder.fingerprint, keep=recipe.checkpoint.keep, note=job.console.print
    )
    saved = store.newest()
    with ExitStack() as stack:
        reporter = stack.enter_context(job.reporter(folder, saved.progress.step if saved else 0))
        parts = _here(job, stack) if job.in_process else _on_ray(job, folder, stack)
        group, critic = parts.policy, parts.critic
        with phase(job.console, "loading the model"):
            group.build(LearnerSpec(recipe, cut, job.schedule_steps))
        with phase(job.console, "checking memory and layout"):
            cut = probed_cut(job.plan, job.data, cut, group, reporter.note)
            check_layout(recipe, job.algorithm, job.data, cut, group, reporter.note)
        if critic is not None:
            critic.build(
                LearnerSpec(
                    critic_recipe(recipe), replace(cut, workers=critic.world), job.schedule_steps, "critic"
                )
            )
        with phase(job.console, "starting rollout actors and rewards"):
            generator, scorer, bridge = parts.rollouts()
        trained = [group] if critic is None else [group, critic]
        sampling = sampling_of(recipe)
        base = group.call(model_fingerprint)[0]
        checkpoints = RunCheckpoints(
            store, trained, saved, base, final=recipe.checkpoint.final, last=job.plan.total_steps
        )
        evaluated = saved is not None and folder.evaluated(saved.progress.step)
        trainer = OnlineTrainer(
            plan=_plan(job, sampling, evaluated),
            learning=_learning(job, cut, group, critic, reporter),
            prompts=job.prompts.batches,
            generator=generator,
            scorer=scorer,
            weights=bridge,
            evaluator=RolloutEvaluator(_held_out(job), recipe.evaluation, sampling, generator, scorer),
            report=reporter,
            checkpoints=checkpoints,
            timeline=Timeline(folder.root / "trace.json"),
            stop=stop,
        )
        progress = trainer.run()
        stop.doing = "exporting the model"
        reporter.note(f"exporting to {folder.export}")
        group.export(folder.export, job.card(folder))
        if said := widened(job.recipe, folder.export):
            reporter.note(said)
        if critic is not None and recipe.critic.export:
            critic.export(folder.critic_export, job.card(folder))
        folder.mark_done(progress.step)
        checkpoints.finish()
        return progress


Rolling = tuple[Generator, Scorer, WeightSync]


@dataclass(frozen=True, slots=True)
class Parts:
    """The live objects of an attempt: learners that hold no model yet, and what makes completions and rewards
    when they do."""

    policy: Ranks
    critic: Ranks | None
    rollouts: Callable[[], Rolling]


def _on_ray(job: Job, folder: RunFolder, stack: ExitStack) -> Parts:
    """Workers and actors of Ray, in the resources that are reserved for all of them at once."""
    recipe, parameters, logs = job.recipe, job.sizes().all, folder.logs
    with phase(job.console, "starting Ray"):
        connect(store_for(job.store_bytes()))
    with phase(job.console, "starting workers"):
        placed = stack.enter_context(
            reserved((*job.demands(), *job.reward_models()), recipe.learners.start_timeout_s)
        )
        learners, together = recipe.learners, _together(recipe)
        policy = stack.enter_context(
            LearnerGroup(
                learners, parameters=parameters, logs=logs, colocated=together, placement=placed["learners"]
            )
        )
        critic = stack.enter_context(_critic(job, folder, placed)) if _has_critic(job) else None

    def rollouts() -> Rolling:
        scorer = stack.enter_context(
            RewardPool(recipe.rewards, model_for_tokenizer=recipe.model, logs=logs, placed=placed)
        )
        pool = stack.enter_context(
            RolloutPool(recipe, parameters=parameters, logs=logs, placement=_of_rollouts(placed))
        )
        return pool, scorer, make_weight_sync(recipe, policy, pool)

    return Parts(policy, critic, _recorded(recipe) or rollouts)


def _here(job: Job, stack: ExitStack) -> Parts:
    """All of it in this process."""
    recipe = job.recipe
    policy = stack.enter_context(LocalRank(recipe.learners))
    critic = stack.enter_context(LocalRank(critic_recipe(recipe).learners)) if _has_critic(job) else None

    def rollouts() -> Rolling:
        local = LocalRollouts(recipe, policy)
        return local, LocalRewards(recipe.rewards, recipe.model), local

    return Parts(policy, critic, _recorded(recipe) or rollouts)


def _has_critic(job: Job) -> bool:
    return job.algorithm.online is not None and job.algorithm.online.critic


def _recorded(recipe: Recipe) -> Callable[[], Rolling] | None:
    """A recording in the place of live actors and rewards."""
    if recipe.rollouts.replay is None:
        return None
    replay = Replay.read(recipe.rollouts.replay)
    return lambda: (replay, replay, NoSync())


def _together(recipe: Recipe) -> Rollouts | None:
    """Rollout actors that share the learners' GPUs."""
    return (
        recipe.rollouts
        if recipe.rollouts.placement == "colocated" and recipe.rollouts.replay is None
        else None
    )


def _of_rollouts(placed: Mapping[str, Placement]) -> Placement:
    """Where rollout actors live: in the learners' bundles where they are colocated."""
    return placed.get("rollouts", placed["learners"])


def critic_recipe(recipe: Recipe) -> Recipe:
    """The recipe of PPO's value model: its own model, optimizer and workers, everything else the policy's."""
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


def _critic(job: Job, folder: RunFolder, placed: Mapping[str, Placement]) -> LearnerGroup:
    recipe = critic_recipe(job.recipe)
    parameters = model_sizes(recipe, value_model(recipe.algorithm)).all
    return LearnerGroup(
        recipe.learners, parameters=parameters, logs=folder.logs, name="critic", placement=placed["critic"]
    )


def _learning(job: Job, cut: Cut, group: Ranks, critic: Ranks | None, reporter: RunReporter) -> TrainedRoles:
    policy = OptimizerStepper(job.algorithm, group, cut, _attach(job, group), reporter, job.guards())
    if critic is None:
        return TrainedRoles(policy)
    # the critic's loss says nothing of the policy's anchor or traffic
    values = OptimizerStepper(
        job.algorithm, critic, replace(cut, workers=critic.world), lambda batch: batch, reporter, Guards()
    )
    return TrainedRoles(policy, values)


def _attach(job: Job, group: Learner) -> Attach:
    """Pairs of online DPO get live reference log-probs; policy gradients carry theirs in their experience."""
    online = job.algorithm.online
    if online is None or online.advantage is not None or not job.algorithm.needs_reference:
        return lambda batch: batch

    def attach(batch: PackedBatch) -> PackedBatch:
        return batch.with_reference(group.token_logprobs(batch, reference=True))

    return attach


def sampling_of(recipe: Recipe) -> Sampling:
    """How a recipe's completions are drawn."""
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


def _plan(job: Job, sampling: Sampling, evaluated: bool) -> OnlinePlan:
    recipe = job.recipe
    algorithm = recipe.algorithm
    return OnlinePlan(
        algorithm=job.algorithm,
        seed=recipe.run.seed,
        total_steps=job.plan.total_steps,
        mini_batch=recipe.batch.effective // job.algorithm.group_examples,
        epochs=algorithm.epochs,
        optimizer_steps=job.optimizer_steps,
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
        sources=job.data.loaded.names,
    )


def _held_out(job: Job) -> tuple:
    """No actor is there to answer held-out prompts where rollouts are replayed."""
    assert job.prompts is not None
    return () if job.recipe.rollouts.replay is not None else job.prompts.held_out


def evaluate(job: Job) -> dict[str, float]:
    """Held-out rewards of the recipe's model as it is, on learners (for its weights) and rollout actors."""
    assert job.prompts is not None
    recipe = job.recipe
    with ExitStack() as stack:
        connect(store_for(job.store_bytes()))
        groups = [g for g in (*job.demands(), *job.reward_models()) if g.what != "critic"]
        placed = stack.enter_context(reserved(groups, recipe.learners.start_timeout_s))
        parameters = job.sizes().all
        learners, together = recipe.learners, _together(recipe)
        group = stack.enter_context(
            LearnerGroup(learners, parameters=parameters, colocated=together, placement=placed["learners"])
        )
        group.build(LearnerSpec(recipe, job.plan.cut, 1))
        scorer = stack.enter_context(
            RewardPool(recipe.rewards, model_for_tokenizer=recipe.model, logs=None, placed=placed)
        )
        pool = stack.enter_context(RolloutPool(recipe, parameters=parameters, placement=_of_rollouts(placed)))
        make_weight_sync(recipe, group, pool).publish(0)
        return dict(
            RolloutEvaluator(job.prompts.held_out, recipe.evaluation, sampling_of(recipe), pool, scorer)
            .evaluate(0)
            .metrics
        )

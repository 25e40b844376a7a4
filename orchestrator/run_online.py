"""One attempt at an online run: the live objects of a recipe, and the loop over them.

    plan --learners, critic--> policy --bridge--> rollout actors --reward pool--> OnlineTrainer --> export
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

from orchestrator.algorithms import critic as value_model
from orchestrator.checkpoints import CheckpointStore
from orchestrator.cluster.joining import connect, store_for
from orchestrator.cluster.placement import Placement, reserved
from orchestrator.cluster.reward_workers import RewardPool
from orchestrator.cluster.rollout_workers import RolloutPool
from orchestrator.cluster.weight_bridge import make_bridge
from orchestrator.cluster.workers import LearnerGroup
from orchestrator.config import Learners, Recipe, Rollouts
from orchestrator.controllers.online import Learning, OnlinePlan, OnlineTrainer
from orchestrator.controllers.rollout_evaluation import RolloutEvaluator
from orchestrator.controllers.step import Attach, Guards, Stepper
from orchestrator.episodes import Sampling
from orchestrator.job import Job
from orchestrator.learner.checks import model_fingerprint
from orchestrator.learner.learner import LearnerSpec
from orchestrator.memory_model import model_sizes
from orchestrator.models.rounding import widened
from orchestrator.observe.phases import phase
from orchestrator.observe.reporter import RunReporter
from orchestrator.observe.timeline import Timeline
from orchestrator.records import Cut, PackedBatch, Progress
from orchestrator.resume import RunCheckpoints
from orchestrator.roles import Generator, Learner, Scorer, WeightBridge
from orchestrator.rollout.replay import NoBridge, Replay
from orchestrator.run_folder import RunFolder
from orchestrator.startup import check_layout, probed_cut
from orchestrator.stopping import Stop


def attempt(job: Job, folder: RunFolder, cut: Cut, stop: Stop) -> Progress:
    """Runs from the newest checkpoint to the end, or until a worker is lost."""
    recipe, online = job.recipe, job.algorithm.online
    assert online is not None and job.prompts is not None
    store = CheckpointStore(folder.checkpoints, run=folder.fingerprint, keep=recipe.checkpoint.keep, note=job.console.print)
    saved = store.newest()
    with ExitStack() as stack:
        reporter = stack.enter_context(job.reporter(folder, saved.progress.step if saved else 0))
        together = _together(recipe)
        with phase(job.console, "starting Ray"):
            connect(store_for(job.store_bytes()))
        parameters = job.sizes().all
        with phase(job.console, "starting workers"):
            placed = stack.enter_context(reserved((*job.demands(), *job.reward_models()), recipe.learners.start_timeout_s))
            learners = LearnerGroup(recipe.learners, parameters=parameters, logs=folder.logs, colocated=together, placement=placed["learners"])
            group = stack.enter_context(learners)
        with phase(job.console, "loading the model"):
            group.build(LearnerSpec(recipe, cut, job.schedule_steps))
        with phase(job.console, "checking memory and layout"):
            cut = probed_cut(job.plan, job.data, cut, group, reporter.note)
            check_layout(recipe, job.algorithm, job.data, cut, group, reporter.note)
        critic = _critic(job, folder, cut, placed, stack) if online.critic else None
        generator, scorer, bridge = _rollouts(job, parameters, folder, group, placed, stack)
        trained = [group] if critic is None else [group, critic]
        sampling = sampling_of(recipe)
        base = group.call(model_fingerprint)[0]
        checkpoints = RunCheckpoints(store, trained, saved, base, final=recipe.checkpoint.final, last=job.plan.total_steps)
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


def _rollouts(
    job: Job, parameters: int, folder: RunFolder, group: LearnerGroup, placed: Mapping[str, Placement], stack: ExitStack
) -> tuple[Generator, Scorer, WeightBridge]:
    """Live actors and rewards, or a recording of them."""
    recipe = job.recipe
    if recipe.rollouts.replay is not None:
        replay = Replay.read(recipe.rollouts.replay)
        return replay, replay, NoBridge()
    scorer = stack.enter_context(RewardPool(recipe.rewards, model_for_tokenizer=recipe.model, logs=folder.logs, placed=placed))
    pool = stack.enter_context(RolloutPool(recipe, parameters=parameters, logs=folder.logs, placement=_of_rollouts(placed)))
    return pool, scorer, make_bridge(recipe, group, pool)


def _together(recipe: Recipe) -> Rollouts | None:
    """Rollout actors that share the learners' GPUs."""
    return recipe.rollouts if recipe.rollouts.placement == "colocated" and recipe.rollouts.replay is None else None


def _of_rollouts(placed: Mapping[str, Placement]) -> Placement:
    """Where rollout actors live: in the learners' bundles where they are colocated."""
    return placed.get("rollouts", placed["learners"])


def critic_recipe(recipe: Recipe) -> Recipe:
    """The recipe of PPO's value model: its own model, optimizer and workers, everything else the policy's."""
    critic = recipe.critic
    optimizer = recipe.optimizer.model_copy(update={"learning_rate": critic.learning_rate or recipe.optimizer.learning_rate})
    sizes = {"workers": critic.workers, "gpus_per_worker": critic.gpus_per_worker, "cpus_per_worker": critic.cpus_per_worker}
    learners: Learners = recipe.learners.model_copy(update=sizes)
    model = critic.model or recipe.model.model_copy(update={"lora": None, "reference": None})
    return recipe.model_copy(update={"model": model, "optimizer": optimizer, "learners": learners})


def _critic(job: Job, folder: RunFolder, cut: Cut, placed: Mapping[str, Placement], stack: ExitStack) -> LearnerGroup:
    recipe = critic_recipe(job.recipe)
    parameters = model_sizes(recipe, value_model(recipe.algorithm)).all
    group = stack.enter_context(LearnerGroup(recipe.learners, parameters=parameters, logs=folder.logs, name="critic", placement=placed["critic"]))
    group.build(LearnerSpec(recipe, replace(cut, workers=recipe.learners.count), job.schedule_steps, "critic"))
    return group


def _learning(job: Job, cut: Cut, group: LearnerGroup, critic: LearnerGroup | None, reporter: RunReporter) -> Learning:
    policy = Stepper(job.algorithm, group, cut, _attach(job, group), reporter, job.guards())
    if critic is None:
        return Learning(policy)
    # the critic's loss says nothing of the policy's anchor or traffic
    values = Stepper(job.algorithm, critic, replace(cut, workers=critic.world), lambda batch: batch, reporter, Guards())
    return Learning(policy, values)


def _attach(job: Job, group: Learner) -> Attach:
    """Pairs of online DPO get live reference log-probs; policy gradients carry theirs in their experience."""
    online = job.algorithm.online
    if online is None or online.estimate is not None or not job.algorithm.needs_reference:
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
        alarm=algorithm.correction.alarm,
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
        group = stack.enter_context(LearnerGroup(learners, parameters=parameters, colocated=together, placement=placed["learners"]))
        group.build(LearnerSpec(recipe, job.plan.cut, 1))
        scorer = stack.enter_context(RewardPool(recipe.rewards, model_for_tokenizer=recipe.model, logs=None, placed=placed))
        pool = stack.enter_context(RolloutPool(recipe, parameters=parameters, placement=_of_rollouts(placed)))
        make_bridge(recipe, group, pool).publish(0)
        return dict(RolloutEvaluator(job.prompts.held_out, recipe.evaluation, sampling_of(recipe), pool, scorer).evaluate(0).metrics)

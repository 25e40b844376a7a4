"""Explanation and fix of each alert, by its title."""

from collections.abc import Mapping

ADVICE: Mapping[str, str] = {
    "non-finite step": (
        "Such a step teaches nothing, and five in a row end the run. "
        "Fix: lower optimizer.learning_rate or warm up longer; logs/driver.log names the examples"
    ),
    "reward collapse": (
        "The policy has lost what it had learned. Fix: go back to an earlier checkpoint with a lower "
        "optimizer.learning_rate, or a higher algorithm.kl.coefficient"
    ),
    "rewards without spread": (
        "Equal rewards teach nothing: all prompts are solved, or the reward is broken. "
        "Fix: look at the rollouts in report.html; give harder prompts, or a reward that separates answers"
    ),
    "no signal": (
        "An advantage compares the answers to one prompt, so these steps change nothing. "
        "Fix: look at the rollouts in report.html; give easier prompts, a reward with partial credit, more "
        "rollouts.samples or a higher rollouts.temperature"
    ),
    "far from the reference": (
        "So far from its start a model often loses its language or finds holes in the reward. "
        "Fix: read the rollouts in report.html; raise algorithm.kl.coefficient, or lower "
        "optimizer.learning_rate"
    ),
    "a component falls": (
        "The total can rise through an easy component while the wanted one gets worse. "
        "Fix: read the rollouts in report.html; raise the weight of that component in rewards.functions, or "
        "multiply the easy one by it"
    ),
    "margin without accuracy": (
        "The loss falls on pairs that were right already. Fix: stop earlier, lower "
        "optimizer.learning_rate, or raise algorithm.beta; look at the most-wrong pairs in report.html"
    ),
    "margin without accuracy, held out": (
        "The loss falls on pairs that were right already. Fix: stop earlier, lower "
        "optimizer.learning_rate, or raise algorithm.beta; look at the most-wrong pairs in report.html"
    ),
    "held-out loss rose": (
        "On held-out data the model has become worse than it was. Fix: lower optimizer.learning_rate "
        "(LoRA and full fine-tuning need different ones) or train for fewer steps; use the checkpoint with "
        "the lowest held-out loss"
    ),
    "goodput low": (
        "Restarts, checkpoints and evaluations took the rest. Fix: raise checkpoint.every and "
        "evaluation.every, and see logs/ for why workers were lost"
    ),
    "repeated restarts": (
        "A cause that stays will end the run. "
        "Fix: logs/ shows why workers were lost; `orchestrator doctor` checks every node"
    ),
}
"""Title -> "why it matters. Fix: what to do"."""

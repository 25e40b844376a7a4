"""GRPO with a reward of your own: `python examples/own_reward.py`, or with --no-ray in this process."""

import sys

import orchestrator

RECIPE = {
    "run": {"name": "letters", "max_steps": 15},
    "model": {"tiny": {"architecture": "llama", "hidden_size": 64, "layers": 2, "heads": 4}},
    "data": {"train": "toy:prompts"},
    "algorithm": {"name": "grpo"},
    "batch": {"effective": 128},
    "optimizer": {"learning_rate": 1e-2},
    "learners": {"workers": 1, "cpus_per_worker": 0.5},
    "rollouts": {"workers": 1, "cpus_per_worker": 0.5, "prompts": 16, "samples": 8, "max_new_tokens": 8},
}


def letters(text: str) -> float:
    """Share of an answer's characters that are small letters."""
    return sum("a" <= character <= "z" for character in text) / max(len(text), 1)


def main() -> None:
    recipe = orchestrator.load_recipe(RECIPE)
    with orchestrator.Session(recipe, in_process="--no-ray" in sys.argv) as session:
        for step in range(session.steps):
            groups = session.generate(step)
            rewards = [[letters(rollout.completion) for rollout in group.rollouts] for group in groups]
            session.forward_backward(session.with_advantages(groups, rewards), step)
            session.optim_step(step)
            print(f"step {step + 1}: reward {sum(map(sum, rewards)) / sum(map(len, rewards)):.3f}")
        session.save("runs/example-grpo")


if __name__ == "__main__":
    main()

"""Supervised fine-tuning in a loop of your own: `python examples/sft.py`, or --no-ray for this process."""

import sys

import orchestrator


def main() -> None:
    recipe = orchestrator.load_recipe("tiny/sft", "run.max_steps=20", "batch.effective=64")
    with orchestrator.Session(recipe, in_process="--no-ray" in sys.argv) as session:
        for step in range(session.steps):
            learned = session.forward_backward(session.examples(step), step)
            applied = session.optim_step(step)
            print(f"step {step + 1}: loss {learned.loss:.6f}, gradient norm {applied.grad_norm:.4f}")
        session.save("runs/example-sft")


if __name__ == "__main__":
    main()

"""DPO with a loss of your own: `python examples/own_loss.py`, or with --no-ray in this process.

In a whole run: `orchestrator train tiny/dpo algorithm.loss=examples/own_loss.py:dpo`. The proof that no cut
of the batch changes it: `orchestrator verify tiny/dpo algorithm.loss=examples/own_loss.py:dpo`.
"""

import sys

from torch import Tensor
from torch.nn.functional import logsigmoid

import orchestrator

BETA = 0.1


def dpo(scores: orchestrator.TokenScores, units: orchestrator.LossUnits) -> Tensor:
    """-log sigmoid(beta * margin), summed over the pairs at hand, divided by the pairs of the whole batch."""
    ratios = scores.sums() - scores.ref_sums()  # Float[n, 2]: log-ratio of (chosen, rejected)
    losses = -logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1]))
    return losses.sum() / units.examples


def main() -> None:
    recipe = orchestrator.load_recipe("tiny/dpo", f"algorithm.loss={__file__}:dpo", "run.max_steps=20")
    with orchestrator.Session(recipe, in_process="--no-ray" in sys.argv) as session:
        for step in range(session.steps):
            learned = session.forward_backward(session.examples(step), step)
            session.optim_step(step)
            margin = learned.means["rewards/margins"]
            print(f"step {step + 1}: loss {learned.loss:.6f}, margin {margin.total / margin.count:.6f}")
        session.save("runs/example-dpo")


if __name__ == "__main__":
    main()

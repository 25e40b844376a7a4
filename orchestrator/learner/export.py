"""From a learner on any number of ranks to a Hugging Face folder."""

from pathlib import Path

from orchestrator.learner.learner import RankLearner
from orchestrator.learner.state import full_weights
from orchestrator.models.export import export


def export_learner(learner: RankLearner, directory: Path, card: str) -> Path:
    """Writes the trained model to `directory` on rank 0; the other ranks take part in the gathers. A collective."""
    names = learner.scoring.hf_names()
    weights = ((names[name], weight) for name, weight in full_weights(learner))
    if learner.group.rank == 0:
        dtype = "bfloat16" if learner.spec.recipe.learners.precision in ("bf16", "bf16_autocast") else "float32"
        return export(weights, base=learner.loaded.model, tokenizer=learner.loaded.tokenizer, directory=directory, card=card, dtype=dtype)
    for _ in weights:
        pass
    return directory

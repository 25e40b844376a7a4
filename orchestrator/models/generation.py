"""Generation settings that can be saved. transformers reads some settings that it refuses to save, which
would fail only at the end of a run."""

from copy import deepcopy
from typing import Any

from transformers import GenerationConfig

PLAIN = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Settings that are kept if transformers refuses the others."""


def savable(config: Any) -> tuple[Any, str]:
    """(settings that save_pretrained accepts, a sentence on what was changed, or "").

    If there are sampling flags beside do_sample=false, do_sample becomes true, as transformers advises. If it
    refuses even that, only the token ids are kept.
    """
    refused = _refusal(config)
    if not refused:
        return config, ""
    sampling = deepcopy(config)
    sampling.do_sample = True
    if not _refusal(sampling):
        return (
            sampling,
            f"do_sample is set to true in the export, since it is false beside sampling flags: {refused}",
        )
    bare = GenerationConfig(**{name: getattr(config, name, None) for name in PLAIN})
    return bare, f"only token ids are kept in the export: {refused}"


def _refusal(config: Any) -> str:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())[:200]
    return ""

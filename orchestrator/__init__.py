"""orchestrator: aligns language models with an effective batch that no hardware can change."""

__version__ = "0.1.0"

"""Metrics, sinks (JSONL, console, wandb), alerts and reports of a run."""

"""What a run shows of itself: metrics, sinks (JSONL, console, wandb), alerts, reports."""

"""What a run shows of itself: sinks (JSONL, console, wandb), the HTML report, the model card, coloured tokens."""

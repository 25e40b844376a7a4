"""One DeepSpeed rank: forward, backward, optimizer step, state, weights to publish."""

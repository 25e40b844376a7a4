"""The equations: pure functions from log-probs to sums of losses, never means."""

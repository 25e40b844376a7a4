"""Samples and their rewards: engines, environments, rewards. No Ray."""

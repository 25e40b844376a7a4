"""Samples and what they are worth: engines, environments, rewards, without Ray."""

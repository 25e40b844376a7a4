"""Samples and what they are worth: generators, environments, reward functions and reward models, without ray."""

"""Rewards: functions, HTTP endpoints, reward models, and their weighted sum."""

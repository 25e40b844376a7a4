"""`orchestrator chat`."""

"""`orchestrator init`."""

"""Transformers models: load, forward, attention, weights on their way, export."""

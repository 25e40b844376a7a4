"""Transformers models: loading, forward, attention, transfer of weights, export."""

"""The stages of benchmarks/gpu.py. Each part of a stage runs in a separate process."""

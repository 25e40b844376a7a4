"""The stages of benchmarks/gpu.py, each run in processes of its own."""

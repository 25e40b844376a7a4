"""Submits a recipe of this machine as a job elsewhere: Ray jobs, Slurm, Kubernetes, SkyPilot."""

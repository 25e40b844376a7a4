"""From a recipe here to a job there: Ray jobs, Slurm, Kubernetes, SkyPilot."""

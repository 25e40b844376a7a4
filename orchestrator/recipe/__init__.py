"""YAML to a checked `Recipe`: schema, files and `extends`, overrides, pipelines, readers of each key,
fingerprint."""

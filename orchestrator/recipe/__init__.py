"""YAML to a checked `Recipe`: the schema, files and `extends`, overrides, pipelines, who reads each key, the
fingerprint."""

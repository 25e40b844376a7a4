"""What decodes: transformers with a padded or a paged batch, and vLLM."""

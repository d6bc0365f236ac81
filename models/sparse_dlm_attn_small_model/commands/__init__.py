"""Commands that the small model adds to ``sparse-dlm-attn``; nothing heavy is imported before they run."""

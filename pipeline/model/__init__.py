"""Models on disk: where a base comes from, and texts that try a tokenizer."""

"""Models as transformers has them: where a base comes from, loading, answers, losses, and the memory they need."""

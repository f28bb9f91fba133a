"""Fine-tune a language model with LoRA and serve it in Ollama, with proof that what is served is what was trained."""

__version__ = "0.1.0"

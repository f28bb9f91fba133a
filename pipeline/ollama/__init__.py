"""Ollama: the server, its client, and a chat template that sends what was trained."""

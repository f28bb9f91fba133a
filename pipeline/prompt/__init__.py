"""From messages to a prompt: chat template, tokenizer, what is trained of it, and how a server renders it."""

"""Conversations: read from files, checked, rendered by the model's own template, labelled for the loss,
judged."""

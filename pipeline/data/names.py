"""The names that people give to roles, texts and marks in their rows: each with what it means here.

What stands in none of these tables is no part of a row: it is named, and refused unless `data.ignore` lists it.
"""

from __future__ import annotations

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
# Roles of ShareGPT whose text is a call of a tool, written as JSON.
CALLS = ("function_call", "tool_call")

REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "reasoning_text")

# Whether a message or a row is trained: 1 says yes, 0 no. The other table has it the other way round.
MARKS = (
    "weight", "train", "training", "trainable", "trained", "loss", "loss_weight", "loss_mask", "train_on_turn",
)  # fmt: skip
MARKS_OF_NO_TRAINING = ("masked", "no_loss", "ignore_loss")
MARKS_OF_PARTS = ("train_detail", "train_details", "content_mask", "token_mask", "loss_spans")

IMAGES_AND_SOUND = (
    "image", "images", "image_url", "image_path", "video", "videos", "audio", "audios", "input_audio", "pixel_values",
    "file", "input_image",
)  # fmt: skip

# Keys by which preference data is known: several answers to one question, or a judgement of one.
PREFERENCES = (
    "chosen", "rejected", "kto_tag", "response_a", "response_b", "preferred", "dispreferred", "preferred_output",
    "non_preferred_output",
)  # fmt: skip

# Columns that are likely to be a question or an answer: for the advice in a message, never taken by themselves.
LIKELY_QUESTIONS = ("question", "query", "input", "user", "human", "request", "problem", "instruction", "prompt")
LIKELY_ANSWERS = ("response", "answer", "output", "assistant", "reply", "solution", "target", "completion")

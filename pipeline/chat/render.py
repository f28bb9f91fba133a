"""The text of a conversation is what the tokenizer's own Jinja template makes of it, and nothing else.

Everything that the program proves about prompts starts from this one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.errors import UserError


def render(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[dict[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """Render a conversation as transformers does.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: {"role", "content"} and what else the template knows.
        add_generation_prompt: end with what makes the model answer.
        tools: JSON schemas of the tools that the model may call.
        variables: further variables of the template, e.g. enable_thinking=False.

    Raises:
        UserError: there is no template, or it refuses these messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, so there is no text to train on: take an instruct model "
            "as the base, or put a chat_template.jinja into its folder"
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **variables,
            )
        )
    except (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        # Templates refuse with raise_exception, and trip over what their author did not think of in any way.
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise UserError(f"the model's chat template refuses a conversation of ({roles}): {error}") from None

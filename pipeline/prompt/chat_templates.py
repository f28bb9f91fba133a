"""A chat template that is not the base's own, put on its tokenizer: a well-known one, or a file.

A turn has to end in one token of the base, or the model never learns to stop; that token is then EOS too, so that
every server stops at it. What else a template writes may be ordinary text to the base.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.resources import chat_templates

# For a base without a template: it ends every turn with EOS, which each base has, and needs no other token.
DEFAULT = "zephyr"
OF_TEXTS = "completion"  # for a model of whole texts: it goes on with what it is sent
_TOKEN = re.compile(r"<\|?[^<>\s]+>|\[/?[A-Z_]+\]")  # what is written as a special token
_QUESTION, _ANSWER = "Qzx", "Azx"


def template_file(name: str | None) -> Path:
    """The file of `model.chat_template`: a well-known name, a path, or None for the default."""
    return chat_templates().get(name or DEFAULT, Path(name or ""))


def template_source(base: Path, name: str | None) -> str:
    """The text of the chat template that a base is trained with: the given one, its own, or the default."""
    if name is None:
        own = base / "chat_template.jinja"
        if own.is_file():
            return own.read_text(encoding="utf-8")
        settings = base / "tokenizer_config.json"
        if settings.is_file() and (found := json.loads(settings.read_text(encoding="utf-8")).get("chat_template")):
            return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return template_file(name).read_text(encoding="utf-8")


def put_on(tokenizer: Any, name: str) -> list[str]:
    """Give a tokenizer this chat template, and the EOS that follows from it.

    Args:
        tokenizer: of transformers; it is changed.
        name: a well-known one's, or a file's path.

    Returns:
        What a user should know of it, in words.

    Raises:
        UserError: the file cannot be read, or the template needs tokens that the tokenizer does not have.
    """
    from pipeline.prompt.template import adds_bos  # which stands on this file

    where, file = f"model.chat_template: {name}", template_file(name)
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read as text: {error}") from None
    if name in chat_templates() and adds_bos(tokenizer):
        source = "{{- bos_token }}\n" + source  # as the tokenizer does, where a template is rendered to ids at once
    if tokenizer.eos_token is None and "eos_token" in source:
        raise UserError(f"{where}: it ends a turn with EOS, and the base's tokenizer names none (eos_token)")
    tokenizer.chat_template = source
    conversation = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
    except Exception as error:  # it is somebody's program: it may end in anything
        raise UserError(f"{where}: it refuses a conversation of (user, assistant): {error}") from None
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    written = list(dict.fromkeys(_TOKEN.findall(text)))
    missing = [word for word in written if word not in tokens]
    end = text.rpartition(_ANSWER)[2].strip()
    ends = [token for token in tokens if token.strip() and end.endswith(token)]
    if not ends:
        needs = f"it needs tokens that the base does not have: {', '.join(missing)}"
        if not missing:
            needs = (
                f"it ends an answer with {end!r}, which is no token of the base: the model would never learn to stop"
            )
        add = f"add them (model.add_tokens = {json.dumps(missing)}), or take another: " if missing else ""
        raise UserError(f"{where}: {needs}: {add}these end a turn with the base's EOS and need no other: {_simple()}")
    words = []
    token = max(ends, key=len)
    if token != tokenizer.eos_token:
        words.append(f"EOS is {token} instead of {tokenizer.eos_token}, since it ends a turn")
        tokenizer.eos_token = token
    else:
        words.append(f"a turn ends with EOS, {token}")
    if missing:
        words.append(f"ordinary text to this tokenizer: {', '.join(missing)}")
    return words


def _simple() -> str:
    """The well-known ones that end a turn with whatever EOS a base has."""
    return ", ".join(name for name, path in chat_templates().items() if "eos_token" in path.read_text("utf-8"))

"""The PARAMETERs of a served model: when to stop, how much to remember, how to sample.

They come from what the model is, and the configuration wins: stop strings from the chat template itself, the context
from the model's configuration, sampling from its generation configuration.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.model.facts import context_of
from pipeline.prompt.template import ChatTemplate, TemplateRefused

# A longer context costs every user memory, used or not; whoever needs it sets ollama.parameters.num_ctx.
LARGEST_DEFAULT_CONTEXT = 8192
_SMALLEST_CONTEXT = 4  # Ollama raises a smaller one to it (its server/sched.go)
_LARGEST_FLOAT = 3.4028234663852886e38  # Ollama keeps floats in 32 bits

KNOWN: Mapping[str, type] = {
    "num_ctx": int, "num_batch": int, "num_gpu": int, "main_gpu": int, "use_mmap": bool, "num_thread": int,
    "draft_num_predict": int, "num_keep": int, "seed": int, "num_predict": int, "top_k": int, "top_p": float,
    "min_p": float, "typical_p": float, "repeat_last_n": int, "temperature": float, "repeat_penalty": float,
    "presence_penalty": float, "frequency_penalty": float, "stop": list,
}  # fmt: skip

# transformers' name -> Ollama's
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repeat_penalty",
}


def parameters(model: Path, template: ChatTemplate, given: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """All PARAMETERs of a model.

    Args:
        model: its folder, with config.json and perhaps generation_config.json.
        template: its chat template.
        given: the configuration's own; they win.
        longest: tokens of the longest row that it was trained on: never less context than that.

    Raises:
        UserError: a given parameter is unknown or has a wrong value.
    """
    checked = check_parameters(given)
    values: dict[str, Any] = {"num_ctx": context_length(model, longest)}
    values |= check_parameters(_generation(model))
    if stops := stop_strings(template):
        values["stop"] = stops
    return values | checked


def check_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with the types that Ollama wants.

    Raises:
        UserError: with the key and what is allowed.
    """
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in KNOWN:
            near = difflib.get_close_matches(key, KNOWN, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"Ollama knows {', '.join(KNOWN)}"
            raise UserError(f"ollama.parameters.{key}: unknown; {hint}")
        values[key] = _typed(key, value, KNOWN[key])
        if key == "num_ctx" and value < _SMALLEST_CONTEXT:
            raise UserError(
                f"ollama.parameters.num_ctx = {value}: must be at least {_SMALLEST_CONTEXT}, which Ollama takes instead"
            )
    return values


def _typed(key: str, value: Any, wanted: type) -> Any:
    if wanted is list:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list | tuple) and texts and all(isinstance(text, str) and text for text in texts):
            return list(texts)
        raise UserError(f"ollama.parameters.{key} = {value!r}: must be a text or a list of texts, none of them empty")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is float and number and abs(value) <= _LARGEST_FLOAT:  # which NaN is not
        return float(value)
    if wanted is int and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31:
        return value
    if wanted is bool and isinstance(value, bool):
        return value
    words = {float: "a finite number of at most 3.4e38", int: "a whole number", bool: "true or false"}[wanted]
    raise UserError(f"ollama.parameters.{key} = {value!r}: must be {words}")


def context_length(model: Path, longest: int) -> int:
    """Tokens of context: what the model was made for, up to a limit that every machine can bear."""
    most = context_of(model) or LARGEST_DEFAULT_CONTEXT
    return max(min(most, LARGEST_DEFAULT_CONTEXT), min(longest, most))


def _generation(model: Path) -> dict[str, Any]:
    """What the model's own generation configuration says about sampling."""
    given = _json(model / "generation_config.json")
    values = {ours: given[theirs] for theirs, ours in _SAMPLING.items() if given.get(theirs) is not None}
    if given.get("do_sample") is False:
        values["temperature"] = 0.0
    return values


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a JSON object: {error}") from None


def stop_strings(template: ChatTemplate) -> list[str]:
    """What ends an answer: the special token that the template puts after the assistant's turn, and EOS."""
    after = end_of_turn(template)
    bare = after.strip()
    tokens = [token for token in template.special_tokens if token and bare.startswith(token)]
    # Where no token ends the turn, the text that begins the next one does.
    stops = [max(tokens, key=len)] if tokens else [after.rstrip()] if bare else []
    if template.eos_token and template.eos_token not in stops:
        stops.append(template.eos_token)
    return stops


def end_of_turn(template: ChatTemplate) -> str:
    """The text between an answer and the next question."""
    answer, question = "QzxAxzQ", "QzxBxzQ"
    turns = [("user", "Hi"), ("assistant", answer), ("user", question)]
    try:
        text = template.render([{"role": role, "content": content} for role, content in turns])
    except TemplateRefused:
        return ""
    _, found, rest = text.partition(answer)
    return rest.partition(question)[0] if found else ""

"""The guard: a few characters in front of a GGUF's Jinja that make servers render it as it was trained.

Two things would change it. Without a TEMPLATE, `ollama create` compares the Jinja with a built-in list and installs a
stock Go template where fewer than 100 characters differ; a comment renders to nothing, and each of its 128 double
lines occurs in no template, so each is one difference. And llama.cpp gives the template variables that transformers
does not give it (today's date, whether to keep earlier thinking); setting them to a name that is not defined takes
them away again, in Jinja2 and in llama.cpp alike.
"""

import re

# What llama.cpp defines and transformers does not (its common/chat.cpp and common/jinja/caps.cpp).
FOREIGN = (
    "date_string",
    "datetime",
    "preserve_reasoning",
    "preserve_thinking",
    "clear_thinking",
    "truncate_history_thinking",
    "drop_thinking",
)
# Ollama asks a model to think when a request does not say: "yes" then becomes "not said", and "no" stays.
THINKING_NOT_SAID = (
    "{% if enable_thinking is defined and enable_thinking %}{% set enable_thinking = _not_given %}{% endif %}"
)

SIZE = 512  # bytes of a guard: a multiple of every alignment in use, so that what follows in the file only moves
_WORDS = "{# Rendered by llama.cpp as it stands, and not to be taken for one of Ollama's stock templates. "
_LINES = "\u2550" * 128


def guarded(source: str, *, thinking_not_said: bool = False) -> str:
    """The Jinja template with the guard in front; unchanged if it has one already.

    Args:
        source: the template.
        thinking_not_said: take a request to think for one that does not say.
    """
    if source.startswith(_WORDS):
        return source
    mentioned = [name for name in FOREIGN if re.search(rf"\b{name}\b", source)]
    sets = "".join(f"{{% set {name} = _not_given %}}" for name in mentioned)
    # A line break right after a tag or a comment is not rendered, and the template then begins a line, as it did.
    end = sets + THINKING_NOT_SAID * thinking_not_said + "\n"
    bare = len(f"{_WORDS}{_LINES}#}}{end}".encode())
    return f"{_WORDS}{_LINES}{' ' * (-bare % SIZE)}#}}{end}{source}"

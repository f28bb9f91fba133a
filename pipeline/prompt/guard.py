"""The guard: what is put in front of a GGUF's Jinja so that servers render it as it was trained.

An example. Llama 3.1's chat template says what day it is, unless it is told another one:

    {%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}

transformers tells it none, so the model was trained with "26 Jul 2024". llama.cpp tells every template today's date, so
the model would be asked with another prompt than it knows. The template that is shipped therefore begins with

    {# Rendered by llama.cpp as it stands, and ... ════════ #}{% set date_string = _not_given %}

Nobody defines `_not_given`, so `date_string` is not defined any more either, in Jinja2 and in llama.cpp alike, and the
template goes on as in training. FOREIGN lists all that llama.cpp tells a template and transformers does not; what a
template mentions of it is taken away.

The comment in front is for Ollama. Without a TEMPLATE, `ollama create` compares the Jinja with a built-in list, and
installs a Go template of its own for one that differs from an entry in fewer than 100 characters. A comment renders to
nothing, and its 128 double lines occur in no entry: they are 128 differences.
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

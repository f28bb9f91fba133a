"""Names of models in Ollama: which it takes, and which are the same to it."""

import re

from pipeline.errors import UserError

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_SPACE = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}"
_HOST = r"[A-Za-z0-9_][A-Za-z0-9_.:-]*"
_NAME = re.compile(rf"(?:(?:{_HOST}/)?{_SPACE}/)?(?P<model>{_PART})(?::(?P<tag>{_PART}))?")

_FILTERED = "deepseek-r1"  # filterThinkTags in Ollama's server/routes.go
_ELSEWHERE = re.compile(r"local|(.*-)?cloud", re.IGNORECASE)  # parseSourceSuffix in its internal/modelref/modelref.go


def check_name(name: str) -> str:
    """A model's name with its tag, e.g. "home" -> "home:latest".

    Raises:
        UserError: Ollama would not take the name, would send a model of this name another prompt, or would ask another
            model than this one.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"ollama.name = {name!r}: not a name that Ollama takes; use letters, digits, '_', '-' and '.', at most 80 "
            "of them, with an optional namespace and tag: namespace/model:tag"
        )
    if match["model"].lower() == _FILTERED:
        raise UserError(
            f"ollama.name = {name!r}: from a model of this very name Ollama drops the thinking of earlier answers, "
            f'whatever it was trained with; choose another, e.g. "{_FILTERED}-home"'
        )
    if match["tag"] and _ELSEWHERE.fullmatch(match["tag"]):
        raise UserError(
            f"ollama.name = {name!r}: Ollama takes the tag {match['tag']!r} for where a model runs, and would ask "
            "another one, here or in a cloud; choose a tag that is not local or cloud and does not end in -cloud"
        )
    return name if match["tag"] else f"{name}:latest"


def canonical(name: str) -> str:
    """One spelling for all the names that Ollama takes for the same model (getExistingName in its server/routes.go).

    Case makes no difference to it, and "home", "library/home:latest" and "registry.ollama.ai/library/home" are one.
    """
    tagged = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
    return tagged.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")

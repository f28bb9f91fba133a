"""Where llama.cpp's programs and its source tree are; `pipeline.processes` runs them.

All of them come from the one pin that `pipeline setup` builds: a converter, a quantizer and a server of different
versions can each succeed and still not agree. PIPELINE_LLAMACPP and PIPELINE_LLAMACPP_SOURCE name other folders.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import NotInstalled


def program(name: str) -> Path:
    """The path of a program, e.g. "llama-quantize".

    Raises:
        NotInstalled: it is not there.
    """
    return _existing(programs_folder() / name, name, "PIPELINE_LLAMACPP")


def installed(name: str) -> bool:
    """Whether a program is there."""
    try:
        program(name)
    except NotInstalled:
        return False
    return True


def programs_folder() -> Path:
    """The folder of the built programs and their shared libraries."""
    return _given("PIPELINE_LLAMACPP", "llamacpp_folder")


def source_tree() -> Path:
    """The pinned source, with convert_hf_to_gguf.py, conversion/ and gguf-py/."""
    tree = _given("PIPELINE_LLAMACPP_SOURCE", "llamacpp_source")
    _existing(tree / "convert_hf_to_gguf.py", "llama.cpp's converter", "PIPELINE_LLAMACPP_SOURCE")
    return tree


def lora_arguments(adapters: Sequence[Path]) -> list[str]:
    """The arguments that load LoRA adapters, as every program of llama.cpp takes them: a row of CSV."""
    quoted = ",".join('"{}"'.format(str(path).replace('"', '""')) for path in adapters)
    return ["--lora", quoted] if adapters else []


def _given(variable: str, from_setup: str) -> Path:
    if given := os.environ.get(variable):
        return Path(given)
    from pipeline.setup import places

    folder: Path | None = getattr(places, from_setup)()
    if folder is None:
        raise NotInstalled("llama.cpp is not built on this machine yet: run `pipeline setup`")
    return folder


def _existing(path: Path, what: str, variable: str) -> Path:
    if not path.is_file():
        remedy = f"{variable} names another folder: correct it" if variable in os.environ else "run `pipeline setup`"
        raise NotInstalled(f"{what} is not at {path}: {remedy}")
    return path

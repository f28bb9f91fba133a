"""llama.cpp's pinned convert_hf_to_gguf.py and convert_lora_to_gguf.py, run in processes with their own gguf-py."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.llamacpp.gguf_file import GGUFInfo, inspect
from pipeline.llamacpp.programs import source_tree
from pipeline.llamacpp.quicker_conversion import quicken
from pipeline.llamacpp.scripts import Scripts
from pipeline.processes import failure
from pipeline.prompt.token_white_space import PHI3, taking

_EXPLANATIONS = {
    "BPE pre-tokenizer was not recognized": (
        "the pinned llama.cpp does not know how this tokenizer splits text, so the GGUF would see other tokens than "
        "were trained: the base cannot be served by this version"
    ),
    "is not supported": "the pinned llama.cpp has no converter for this architecture: choose another base",
    "No module named": "a Python package that this model's converter needs is missing: run `pipeline setup`",
}
# NO_LOCAL_GGUF would make it use another gguf-py than its own.
SCRIPTS = Scripts(
    {"NO_LOCAL_GGUF": None, "HF_HUB_OFFLINE": "1"},
    imports=("torch", "transformers.models.auto.tokenization_auto"),
    change=quicken,
)


def command(model: Path, target: Path, outtype: str, name: str | None = None) -> list[str | Path]:
    """The argument list that converts a Hugging Face folder.

    Args:
        model: the folder.
        target: the GGUF file.
        outtype: "f32", "f16" or "bf16".
        name: the model's name in the file; default: the folder's. llama.cpp takes a name for more than that.
    """
    name = name or model.name
    if not _takes_white_space(model):
        name = PHI3.sub("phi_3", name)
    elif not PHI3.search(name):
        name = f"phi-3-{name}"
    script = source_tree() / "convert_hf_to_gguf.py"
    return [sys.executable, script, model, "--outfile", target, "--outtype", outtype, "--model-name", name]


def _takes_white_space(model: Path) -> bool:
    """Whether tokens of a model take the white space that follows them, which llama.cpp knows by the name alone."""
    try:
        added = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    except (OSError, ValueError, KeyError):  # no tokenizer.json, which is for the converter to say
        return False
    return any(taking({token["content"]: bool(token.get("rstrip")) for token in added}).values())


def adapter_command(adapter: Path, base: Path, target: Path) -> list[str | Path]:
    """The argument list that converts a LoRA adapter; its numbers are written as float32.

    Args:
        adapter: the adapter's folder.
        base: the folder of its base, for its configuration.
        target: the GGUF file.
    """
    script = source_tree() / "convert_lora_to_gguf.py"
    return [sys.executable, script, adapter, "--base", base, "--outfile", target, "--outtype", "f32"]


def convert(arguments: Sequence[str | Path], folder: Path, on_line: Callable[[str], None] = lambda line: None) -> None:
    """Run the converter.

    Args:
        arguments: of `command` or `adapter_command`.
        folder: where it writes, to see whether the disk is full.
        on_line: called with every line that it prints.

    Raises:
        PipelineError: it refuses the model, with what that means and its words.
    """
    output: list[str] = []

    def read(line: str) -> None:
        output.append(line)
        on_line(line)

    status = SCRIPTS.run(arguments[1:], read)  # without the interpreter
    if status:
        explained = [text for sign, text in _EXPLANATIONS.items() if any(sign in line for line in output)]
        error = failure("llama.cpp's converter", status, output, folder)
        raise PipelineError(f"{explained[0]}\n{error}") if explained else error


def convert_adapter(
    arguments: Sequence[str | Path], target: Path, numbers: int, on_line: Callable[[str], None] = lambda line: None
) -> GGUFInfo:
    """Convert an adapter whole: the converter leaves out in silence what it does not know.

    Args:
        arguments: of `adapter_command`.
        target: the file that it writes.
        numbers: how many the adapter's B matrices hold.
        on_line: called with every line that it prints.

    Raises:
        PipelineError: it refuses the adapter, or left something out.
    """
    convert(arguments, target.parent, on_line)
    info = inspect(target)
    written = sum(tensor.elements for tensor in info.tensors if tensor.name.endswith(".lora_b"))
    if written != numbers:
        raise PipelineError(
            f"{target.name} holds {written:,} numbers of the adapter's B matrices, which have {numbers:,}: llama.cpp's "
            'converter has no place for some of its modules; take export.as = "merged"'
        )
    return info


def check_places(adapter: GGUFInfo, base: GGUFInfo) -> None:
    """Every matrix of an adapter has its tensor in the base's file.

    Raises:
        PipelineError: one has none, or one of another shape.
    """
    for tensor in adapter.tensors:
        name, _, which = tensor.name.rpartition(".lora_")
        place = base.names.get(name)
        side, own = (0, tensor.shape[0]) if which == "a" else (1, tensor.shape[1])
        if place is None or len(place.shape) < 2 or place.shape[side] != own:
            shape = "is not there" if place is None else f"is {place.shape}"
            raise PipelineError(
                f"{adapter.path.name}: {tensor.name} is {tensor.shape}, and {name} {shape} in {base.path.name}: "
                'llama.cpp\'s converter misplaced it; take export.as = "merged"'
            )

"""convert: the merged model as a 16-bit GGUF, by llama.cpp's own converter, and a look at what it wrote.

With `export.as = "adapter"` it is the untouched base, with the trained tokenizer, and beside it the adapter as a GGUF.

The converter exits 0 on models that then babble, so its output is opened: every parameter is there, no value is NaN,
the tokenizer is the right kind, the end-of-sequence token is the trained one, and so is the chat template, unless
llama.cpp cannot do what it says (`pipeline.ollama.llamacpp_rendering`).
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import console
from pipeline.errors import PipelineError
from pipeline.llamacpp import converter
from pipeline.llamacpp.gguf_file import GGUFInfo, check, inspect
from pipeline.model import memory
from pipeline.model.adapter_file import read_adapter
from pipeline.model.base import as_trained
from pipeline.model.config_file import SENSES
from pipeline.model.merge_target import merge_files, sixteen_bit_base
from pipeline.model.nf4 import Record
from pipeline.model.plain_adapter import write_plain
from pipeline.model.sixteen_bit_type import sixteen_bit_type
from pipeline.model.weights_file import Weights, read_weights
from pipeline.ollama.llamacpp_rendering import as_carried
from pipeline.processes import require_space
from pipeline.prompt.tokenizer import read_saved, saved_tokenizer
from pipeline.run.layout import Layout
from pipeline.run.stage import Stage, Task
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import document, require_passed, write
from pipeline.verify.weights import prove

if TYPE_CHECKING:
    from pipeline.config import Config

# Said for every model that transformers 5 saved: "default" is its name for no scaling, and that is what is written.
_HARMLESS = ("Unknown RoPE type: default",)
# Tensors that the converter computes from config.json.
_COMPUTED = re.compile(r"^(blk\.\d+\.)?rope_(freqs|factors_long|factors_short)\.weight$")
# Parts of a multimodal or multi-token-prediction model that a text GGUF leaves out, by what config.json calls them.
_LEFT_OUT = (*SENSES, "num_nextn_predict_layers", "mtp_num_hidden_layers")


def main(task: Task) -> dict[str, Any]:
    """Write and check `model-f16.gguf` or `model-bf16.gguf`, and `adapter.gguf` where one is served."""
    apart = task.config.export.as_ == "adapter"
    model = _base_as_trained(task) if apart else task.layout.merged_model
    model = as_carried(model, task.scratch / "carried")
    weights = read_weights(model)
    adapter = _convert_adapter(task, weights) if apart else {}
    asked = task.config.export.outtype
    outtype = sixteen_bit_type(weights) if asked == "auto" else asked
    target = task.new(task.layout.converted(outtype))
    require_space(task.output, memory.sixteen_bit_file(weights.parameters), "the 16-bit GGUF")
    # A base's file is the same for every run on it, whatever the base is called there: so it is shared.
    convert(task, model, target, outtype, "base" if apart else f"{Path(task.config.model.base).name}-tuned")

    info = check(target)
    check_against(info, weights, task)
    if not apart and not task.config.merge.keep:
        _prove(task, target)
    if apart:
        converter.check_places(inspect(task.new(task.layout.gguf_adapter)), info)
    return adapter | {
        "file": target.name,
        "bytes": info.size,
        "type": outtype,
        "architecture": info.architecture,
        "parameters": info.parameter_count,
        "tensors": len(info.tensors),
        "tensor_types": info.tensor_types,
        "bits_per_weight": round(info.bits_per_weight, 3),
        "tokenizer": info.metadata["tokenizer.ggml.model"],
        "pre_tokenizer": info.metadata.get("tokenizer.ggml.pre"),
        "context_length": info.metadata[f"{info.architecture}.context_length"],
    }


def _prove(task: Task, target: Path) -> None:
    """Prove, by the checks of `verify`, what it cannot any more when the merged weights are removed.

    Raises:
        PipelineError: a check failed; the merged weights stay.
    """
    artefacts = Artefacts.of_run(task.run, task.config, task.scratch)
    artefacts.sixteen_bit, artefacts.quantized = target, {}
    content = document(list(prove(artefacts)), ("merge", "convert"))
    write(task.new(task.layout.proof), content)
    require_passed(content)


def _base_as_trained(task: Task) -> Path:
    """The untouched base's folder with the tokenizer that was trained."""
    base = sixteen_bit_base(task.config, task.scratch / "base-16bit")
    return as_trained(base, saved_tokenizer(task.layout.adapter), task.scratch / "base")


def _convert_adapter(task: Task, base: Weights) -> dict[str, Any]:
    """Write `adapter.gguf`, whole: the converter leaves out in silence what it does not know."""
    plain, target = task.scratch / "adapter", task.new(task.layout.gguf_adapter)
    record = Record.read(task.layout.node("train"))
    numbers = write_plain(read_adapter(task.layout.adapter), record, base, plain)
    arguments = converter.adapter_command(plain, base.folder, target)
    task.command(arguments)
    with console.progress("writing the adapter's GGUF", None):
        info = converter.convert_adapter(arguments, target, numbers, print)
    return {"adapter_bytes": info.size, "adapter_tensors": len(info.tensors)}


def convert(task: Task, model: Path, target: Path, outtype: str, name: str) -> None:
    """Run the pinned converter, with a bar and its warnings."""
    arguments = converter.command(model, target, outtype, name)
    task.command(arguments)
    with console.progress("writing the GGUF", 100, "%") as update:

        def read(line: str) -> None:
            if share := re.match(r"Writing:\s+(\d+)%", line):
                update(float(share[1]))
                return
            print(line)
            if line.startswith("WARNING:") and line.count(":") > 1:
                message = line.split(":", 2)[2].strip(" *")
                if message and message not in _HARMLESS:
                    task.warn(f"llama.cpp's converter: {message}")

        converter.convert(arguments, target.parent, read)


def check_against(info: GGUFInfo, weights: Weights, task: Task) -> None:
    """Compare a GGUF with the Hugging Face folder that it was made from.

    Raises:
        PipelineError: parameters are missing, or its tokenizer is not the trained one.
    """
    folder, expected = weights.folder, weights.parameters
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = sum(tensor.elements for tensor in info.tensors if not _COMPUTED.match(tensor.name))
    vocabulary = info.metadata["tokenizer.ggml.tokens"]
    if found != expected:
        message = f"{info.path.name} holds {found:,} parameters, the model that it was made from {expected:,}"
        if not any(config.get(part) for part in _LEFT_OUT):
            raise PipelineError(f"{message}: the converter lost or invented some")
        task.warn(f"{message}: a text GGUF leaves out the other parts of this model")

    tokenizer = read_saved(folder)
    kind = info.metadata["tokenizer.ggml.model"]
    if is_byte_level(folder) and kind != "gpt2":
        raise PipelineError(
            f'{info.path.name}: tokenizer.ggml.model is "{kind}" for a byte-level BPE tokenizer ("gpt2" is right): '
            "the model would see other tokens than it was trained on. The tokenizer.json is one that llama.cpp's "
            "converter misreads"
        )
    trained = {"bos": tokenizer.bos, "eos": tokenizer.eos}
    written = {name: info.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in trained}
    differing = [
        f"{name} {written[name]} instead of {id}"
        for name, id in trained.items()
        if id is not None and written[name] != id
    ]
    if differing:
        raise PipelineError(f"{info.path.name}: other special tokens than were trained: {', '.join(differing)}")
    if len(vocabulary) < tokenizer.size:
        raise PipelineError(f"{info.path.name} has {len(vocabulary)} tokens, the tokenizer {tokenizer.size}")
    template = tokenizer.chat_template
    if template is not None and info.metadata.get("tokenizer.chat_template") != template:
        raise PipelineError(f"{info.path.name}: its chat template is not the trained one")


def is_byte_level(folder: Path) -> bool:
    """Whether the folder's tokenizer.json is a BPE over bytes, as GPT-2's, rather than over characters."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return False
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    return tokenizer["model"].get("type") == "BPE" and '"ByteLevel"' in json.dumps(tokenizer.get("decoder"))


def files(config: "Config", _: str) -> list[Path]:
    """The base's files, where they are what is converted."""
    return merge_files(config) if config.export.as_ == "adapter" else []


STAGE = Stage(
    name="convert",
    summary="Convert the merged model, or the base and its adapter, to 16-bit GGUF.",
    run=main,
    needs=("train", "merge"),
    reads={"train": ("adapter/*", "modules.json", "!adapter/README.md")},
    settings=("export.outtype", "export.as", "model", "merge.model", "merge.keep"),
    # What the proof is told beside: a file that is proven is the same under every threshold.
    indifferent_to=("verify", "export.quant", "adapter", "adapters", "train.load_in_4bit"),
    files=files,
    libraries=("torch", "transformers", "bitsandbytes", "tokenizers", "safetensors", "numpy", "jinja2"),
    programs=("llama.cpp",),
    figures=("type", "bytes", "tensors", "pre_tokenizer"),
    removes=lambda config: {} if config.merge.keep else {"merge": (Layout.MERGED_WEIGHTS,)},
    judged=True,
)

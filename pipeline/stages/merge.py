"""merge: the adapter becomes part of 16-bit weights, never of 4-bit ones.

It is merged tensor by tensor, from file to file (`pipeline.model.merging`), so the memory that it takes does not grow
with the model. An adapter that was trained on 4 bits may fit what NF4 keeps of the weights better than the weights as
they are stored; which of the two depends on the model and on the data, so where nothing else decides it
(`merge_target.chosen_base`) the held-out loss of both is measured. A merge that would leave a module out, or change
nothing, is refused.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.console import progress
from pipeline.errors import PipelineError, UserError
from pipeline.figures import size
from pipeline.model import memory
from pipeline.model.adapter_file import read_adapter
from pipeline.model.base import base_folder
from pipeline.model.config_file import write_vocabulary
from pipeline.model.held_out import (
    RowLoss,
    Rows,
    first_tokens,
    mean_loss,
    read_held_out,
    row_losses,
    trained_places,
)
from pipeline.model.merge_target import check_bits, chosen_base, has_two_bases, merge_files, sixteen_bit_base
from pipeline.model.merging import MergedWeights, write_merged
from pipeline.model.nf4 import Record
from pipeline.model.peft_merging import PeftMerge
from pipeline.model.sentencepiece_file import write_sentencepiece
from pipeline.model.sixteen_bit_type import TORCH_TYPES, sixteen_bit_type
from pipeline.model.weights_file import Weights, read_weights
from pipeline.processes import require_space
from pipeline.prompt.tokenizer import read_saved
from pipeline.run.stage import Stage, Task
from pipeline.setup import machine

# Held-out tokens on which the two bases are compared: the difference of their losses is settled long before.
HELD_OUT_TOKENS = 5000

Measure = Callable[[str, Rows, Callable[[float], None]], list[RowLoss]]


def main(task: Task) -> dict[str, Any]:
    """Write the merged model, with the tokenizer and the chat template that were trained."""
    check_bits(base_folder(task.config.model), task.config)
    base = read_weights(sixteen_bit_base(task.config, task.scratch / "base"))
    output = task.new(task.layout.merged_model)
    output.mkdir()
    require_space(task.output, memory.sixteen_bit_file(base.parameters), "the merged model")
    way = _by_peft if task.config.merge.way == "peft" else _by_tensors
    figures = way(task, base, output)
    _copy_tokenizer(task.layout.adapter, base.folder, output)
    return figures | {
        "stored": TORCH_TYPES[sixteen_bit_type(base)],
        "bytes": read_weights(output).size,
    }


def _by_tensors(task: Task, base: Weights, output: Path) -> dict[str, Any]:
    adapter, record = read_adapter(task.layout.adapter), Record.read(task.layout.node("train"))
    bases = {
        "16bit": MergedWeights(base, adapter, record),
        "dequantized": MergedWeights(base, adapter, record, dequantize=has_two_bases(task.config)),
    }
    change = bases["16bit"].change
    chosen = _choose_base(task, partial(_measured_by_layers, task, base, bases))
    merged = bases[chosen["taken"]]
    with progress("merging", len(merged.names), "tensors") as update:
        sums = write_merged(merged, output, update)
    _write_configuration(task, base, output, merged.vocabulary)
    return _figures(
        chosen, len(merged.additions), change, math.sqrt(sums.base), math.sqrt(sums.rounding), arithmetic="float32"
    )


def _by_peft(task: Task, base: Weights, output: Path) -> dict[str, Any]:
    dequantizes = has_two_bases(task.config)
    loaded = _loaded_by_peft(task, base, dequantizes=dequantizes)
    chosen = _choose_base(task, loaded.losses)
    loaded.take(chosen["taken"] if dequantizes else "16bit")  # else there is one, whichever it is called
    norms = loaded.merge(output)
    _write_generation(task, base, output)
    return _figures(
        chosen, len(loaded.layers), norms["change"], norms["base"], norms["rounding"], arithmetic=loaded.arithmetic
    )


def _loaded_by_peft(task: Task, base: Weights, *, dequantizes: bool) -> PeftMerge:
    return PeftMerge(
        base,
        task.layout.adapter,
        Record.read(task.layout.node("train")),
        dequantizes=dequantizes,
        trust_remote_code=task.config.model.trust_remote_code,
    )


def _figures(
    chosen: dict[str, Any], modules: int, change: float, base: float, rounding: float, arithmetic: str
) -> dict[str, Any]:
    return {
        "modules_merged": modules,
        "merged_into": chosen["taken"],
        **{f"held_out_loss_{name}": loss for name, loss in chosen["losses"].items()},
        "relative_change": change / base,
        "rounding_to_change": rounding / change,
        "arithmetic": arithmetic,
    }


def _choose_base(task: Task, measure: Measure) -> dict[str, Any]:
    """Choose the weights that the adapter is merged into; write base.json.

    Args:
        task: the stage's task.
        measure: the held-out losses of "base", "16bit" or "dequantized" on rows; the last two with the adapter.

    Returns:
        "taken" ("16bit" or "dequantized") and "why"; "losses" (nats for each trained token; empty where nothing was
        measured) and, of each row for `verify`, "row_losses".
    """
    chosen: dict[str, Any] = {"taken": "16bit", "why": "", "losses": {}, "rows": "", "row_losses": {}}
    if (known := chosen_base(task.config)) is None:
        chosen |= _measured(task, measure)
    else:
        chosen["taken"], chosen["why"] = known
    task.new(task.layout.merge_base).write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")
    return chosen


def _measured(task: Task, measure: Measure) -> dict[str, Any]:
    where, held_out = read_held_out(task.layout)
    rows = first_tokens(held_out, HELD_OUT_TOKENS)
    if not any(trained_places(labels) for _, labels in rows):
        return {"why": "there are no held-out answers to measure"}
    row_losses = {}
    names = {"base": "base", "16bit": "adapter on 16-bit", "dequantized": "adapter on 4-bit"}
    for name, what in names.items():
        with progress(f"held-out loss, {what}", len(rows), "rows") as update:
            row_losses[name] = measure(name, rows, update)
    losses = {name: mean_loss(found) for name, found in row_losses.items()}
    taken = "dequantized" if losses["dequantized"] < losses["16bit"] else "16bit"
    return {
        "taken": taken, "why": "its held-out loss is lower", "losses": losses, "rows": where, "row_losses": row_losses,
    }  # fmt: skip


def _measured_by_layers(
    task: Task,
    base: Weights,
    bases: dict[str, MergedWeights],
    what: str,
    rows: Rows,
    update: Callable[[float], None],
) -> list[RowLoss]:
    """Losses layer by layer, of the tensors as they would be merged; of the loaded model where its parts are others."""
    from pipeline.model.layer_by_layer import Layers

    remote = task.config.model.trust_remote_code
    layers = Layers(base, trust_remote_code=remote)
    if layers.lacking:
        needed = memory.merge_by_peft(base.parameters, in_float32=False, dequantizes=True)
        if needed > machine.free_memory():
            raise UserError(
                f'merge.base = "auto" needs {size(needed)} of memory for this model, which is measured whole: '
                f'transformers keeps {layers.lacking[0]} otherwise than its files do. Set merge.base to "16bit" or '
                '"dequantized"'
            )
        return _loaded_by_peft(task, base, dequantizes=True).losses(what, rows, update)
    source = base if what == "base" else bases[what]
    predicted = layers.predict(source.__getitem__, [ids for ids, _ in rows], lambda share: update(share * len(rows)))
    return list(row_losses(predicted, rows))


def _write_configuration(task: Task, base: Weights, output: Path, vocabulary: int | None) -> None:
    """config.json and generation_config.json: the base's, with the type that the weights have now."""
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = TORCH_TYPES[sixteen_bit_type(base)]
    _write(output / "config.json", config)
    if vocabulary is not None:
        write_vocabulary(output / "config.json", vocabulary)
    if task.config.model.trust_remote_code:
        for path in base.folder.glob("*.py"):
            shutil.copy(path, output / path.name)
    _write_generation(task, base, output)


def _write_generation(task: Task, base: Weights, output: Path) -> None:
    """The base's generation configuration, which ends an answer at the trained EOS too."""
    path = base.folder / "generation_config.json"
    if path.is_file():
        generation = json.loads(path.read_text(encoding="utf-8"))
    else:
        config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {key: config[key] for key in keys if config.get(key) is not None}
    own, eos = generation.get("eos_token_id"), read_saved(task.layout.adapter).eos
    ends = own if isinstance(own, list) else [] if own is None else [own]
    if eos is not None and eos not in ends:
        generation["eos_token_id"] = [eos, *ends]
    _write(output / "generation_config.json", generation)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_tokenizer(adapter: Path, base: Path, output: Path) -> None:
    """The trained tokenizer byte for byte, and the base's SentencePiece model, which some converters ask for."""
    for path in adapter.iterdir():
        if path.name not in {"adapter_config.json", "adapter_model.safetensors", "README.md"}:
            shutil.copy(path, output / path.name)
    if (base / "tokenizer.model").is_file() and not (output / "tokenizer.model").exists():
        shutil.copy(base / "tokenizer.model", output / "tokenizer.model")
    write_sentencepiece(output)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise PipelineError(f"{output}: the merged model is quantized; the base must be a 16-bit one")


STAGE = Stage(
    name="merge",
    summary="Merge the adapter into 16-bit weights of the base.",
    run=main,
    needs=("data", "train"),
    reads={
        "data": ("train.tokens.arrow", "validation.tokens.arrow"),
        "train": ("adapter/*", "modules.json", "!adapter/README.md"),
    },
    settings=("model", "merge", "train.load_in_4bit", "export.as"),
    # Adapters that are given come out of the train stage; merge.keep acts when convert is done.
    indifferent_to=("adapter.path", "adapters", "merge.keep"),
    files=lambda config, _: merge_files(config),
    libraries=("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "scipy"),
    begins_with=("torch",),
    figures=("modules_merged", "merged_into", "relative_change", "rounding_to_change", "stored", "bytes"),
    judged=True,
)

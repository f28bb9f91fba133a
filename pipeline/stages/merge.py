"""merge: `merge_and_unload` into 16-bit weights, never into 4-bit ones.

An adapter that was trained on 4 bits may fit what NF4 keeps of the weights better than the weights as they are stored;
which of the two depends on the model and on the data, so the held-out loss of both is measured, and decides. The sum is
taken in float32 where the memory allows it, and rounded once, to the type that the base is stored in. A merge that
would leave a module out, or change nothing, is refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.console import progress
from pipeline.errors import PipelineError
from pipeline.model import memory
from pipeline.model.facts import base_files
from pipeline.model.four_bit import in_16bit
from pipeline.model.held_out import first_tokens, held_out_losses, mean_loss, read_held_out, trained_places
from pipeline.model.load import load_model
from pipeline.model.nf4 import Record, dequantize_base, restore_base
from pipeline.model.sentencepiece_file import write_sentencepiece
from pipeline.model.weights_file import TORCH_TYPES, read_weights
from pipeline.prompt.tokenizer import saved_tokenizer
from pipeline.run.stage import Stage, Task
from pipeline.setup import machine

# Held-out tokens on which the two bases are compared: the difference of their losses is settled long before.
HELD_OUT_TOKENS = 5000


def main(task: Task) -> dict[str, Any]:
    """Write the merged model, with the tokenizer and the chat template that were trained."""
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from pipeline.model.base import resolve_base

    given = resolve_base(task.config.model.base, task.config.model.revision)
    base = in_16bit(given, task.scratch / "base")
    adapter = task.layout.adapter
    weights = read_weights(base)
    stored = getattr(torch, TORCH_TYPES[weights.sixteen_bit_type])
    with progress("loading the base", None):
        dequantizes = task.config.train.load_in_4bit and base == given
        needed = memory.merge(weights.parameters, in_float32=True, dequantizes=dequantizes)
        arithmetic = torch.float32 if needed <= machine.free_memory() else stored
        model = load_model(base, arithmetic, trust_remote_code=task.config.model.trust_remote_code)
    generation = _stopping(model.generation_config, saved_tokenizer(adapter).eos_token_id)
    model = PeftModel.from_pretrained(model, adapter).eval()
    _refuse_partial(model, adapter)
    merged_into = _choose_base(task, model, only=base != given)

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    change, size = 0.0, 0.0
    with torch.no_grad(), progress("measuring the change", len(layers), "modules") as update:
        for done, (name, layer) in enumerate(layers.items(), 1):
            delta = layer.get_delta_weight("default").float().norm().item()
            if not 0 < delta < float("inf"):
                raise PipelineError(
                    f"{name}: its adapter changes nothing, or is not finite; the training did not reach this module. "
                    "Train again (`pipeline train --force`), or leave the module out of lora.target_modules"
                )
            change += delta**2
            size += layer.get_base_layer().weight.float().norm().item() ** 2
            update(done)

    with progress("merging", None):
        model = model.merge_and_unload(safe_merge=True)
    left = [name for name, _ in model.named_parameters() if "lora_" in name]
    if left:
        raise PipelineError(f"the merge left parts of the adapter behind: {left[0]} and {len(left) - 1} more")
    rounding = _round_to(model, stored, {name.removeprefix("base_model.model.") for name in layers})
    model.config.dtype = stored
    model.generation_config = generation

    output = task.new(task.layout.merged_model)
    with progress("saving", None):
        model.save_pretrained(output, max_shard_size="4GB")
    _copy_tokenizer(adapter, base, output)
    return {
        "modules_merged": len(layers),
        "merged_into": merged_into["taken"],
        **{f"held_out_loss_{name}": loss for name, loss in merged_into["losses"].items()},
        "relative_change": (change / size) ** 0.5,
        "rounding_to_change": rounding / change**0.5,
        "arithmetic": str(arithmetic).removeprefix("torch."),
        "stored": str(stored).removeprefix("torch."),
        "bytes": read_weights(output).size,
    }


def _stopping(generation: Any, eos: int | None) -> Any:
    """The base's generation configuration, which ends an answer at the trained EOS too."""
    own = generation.eos_token_id
    ends = own if isinstance(own, list) else [] if own is None else [own]
    if eos is not None and eos not in ends:
        generation.eos_token_id = [eos, *ends]
    return generation


def _choose_base(task: Task, model: Any, *, only: bool) -> dict[str, Any]:
    """Leave those weights under the adapter that it is to be merged into; write base.json.

    Args:
        task: the stage's task.
        model: the PEFT model on the base as it is stored.
        only: the base is stored in 4 bits, and the model has what they unpack to.

    Returns:
        "taken" ("16bit" or "dequantized") and "why"; "losses" (nats for each trained token; empty where nothing was
        measured) and, of each row for `verify`, "row_losses".
    """
    wanted, trained_on_4bit = task.config.merge.base, task.config.train.load_in_4bit
    where, rows = read_held_out(task.layout)
    rows = first_tokens(rows, HELD_OUT_TOKENS)
    measurable = any(trained_places(labels) for _, labels in rows)

    losses: dict[str, float] = {}
    chosen: dict[str, Any] = {"taken": "16bit", "losses": losses, "rows": where, "row_losses": {}}

    def measure(name: str, what: str) -> None:
        with progress(f"held-out loss, {what}", len(rows), "rows") as update:
            chosen["row_losses"][name] = held_out_losses(model, rows, update)
        losses[name] = mean_loss(chosen["row_losses"][name])

    if only:
        chosen |= {"taken": "dequantized", "why": "the base is stored in 4 bits"}
    elif not trained_on_4bit:
        chosen["why"] = "the adapter was trained on the 16-bit base"
    else:
        if measurable:
            with model.disable_adapter():
                measure("base", "base")
            measure("16bit", "adapter on 16-bit")
        with progress("dequantizing", None):
            before = dequantize_base(model, Record.read(task.layout.node("train")))
        if measurable:
            measure("dequantized", "adapter on 4-bit")
        if wanted != "auto":
            chosen |= {"taken": wanted, "why": "merge.base says so"}
        elif not measurable:
            chosen["why"] = "there are no held-out answers to measure"
        else:
            better = "dequantized" if losses["dequantized"] < losses["16bit"] else "16bit"
            chosen |= {"taken": better, "why": "its held-out loss is lower"}
        if chosen["taken"] == "16bit":
            restore_base(model, before)
    task.new(task.layout.merge_base).write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")
    return chosen


def _refuse_partial(model: Any, adapter: Path) -> None:
    """Every tensor of the adapter must have found its place in the model, and every place its tensor."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(adapter / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model)
    if not saved:
        raise PipelineError(f"{adapter}: the adapter holds no tensors; train again (`pipeline train --force`)")
    for name in saved.keys() ^ loaded.keys():
        where = "the adapter has, and the base has no place for," if name in saved else "the adapter lacks"
        raise PipelineError(f"partial merge: {where} {name}; was it trained on another base?")
    for name, tensor in saved.items():
        if not (tensor.to(loaded[name].dtype) == loaded[name].cpu()).all():
            raise PipelineError(f"partial merge: {name} is not what the adapter's file says")


def _round_to(model: Any, stored: Any, merged: set[str]) -> float:
    """Round every weight to the stored type; return the norm of what that took off the merged ones."""
    import torch

    lost = 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rounded = parameter.data.to(stored)
            if not torch.isfinite(rounded).all():
                raise PipelineError(f"{name}: not finite as {stored}; the base was stored in a type of smaller range")
            if name.removesuffix(".weight") in merged:
                lost += (rounded.float() - parameter.data.float()).norm().item() ** 2
            parameter.data = rounded
    return float(lost**0.5)


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
        "train": ("adapter/*", "!adapter/README.md"),
    },
    settings=("model", "merge", "train.load_in_4bit"),
    files=lambda config, _: base_files(config.model),
    libraries=("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors"),
    figures=("modules_merged", "merged_into", "relative_change", "rounding_to_change", "stored", "bytes"),
    judged=True,
)

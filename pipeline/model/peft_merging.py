"""PEFT's own merge, `merge_and_unload`, in memory for the whole model: `merge.way = "peft"`.

It takes every adapter that PEFT can merge. The sum is taken in float32 where the memory allows it, and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.console import progress
from pipeline.errors import PipelineError
from pipeline.model import memory
from pipeline.model.held_out import RowLoss, Rows, held_out_losses
from pipeline.model.load import load_model
from pipeline.model.merging import changes_nothing
from pipeline.model.nf4 import Record, dequantize_base, restore_base
from pipeline.model.sixteen_bit_type import TORCH_TYPES, sixteen_bit_type
from pipeline.model.weights_file import Weights
from pipeline.setup import machine


class PeftMerge:
    """A base in memory with its adapter on it.

    Args:
        base: its weights, in 16 or 32 bits.
        adapter: the adapter's folder.
        record: how training had the modules.
        dequantizes: both bases may be asked for, and one is kept while the other is measured.
        trust_remote_code: run the base's own Python code.

    Raises:
        PipelineError: the adapter and the base do not belong together.
    """

    def __init__(
        self, base: Weights, adapter: Path, record: Record, *, dequantizes: bool, trust_remote_code: bool
    ) -> None:
        import torch
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        self._stored = getattr(torch, TORCH_TYPES[sixteen_bit_type(base)])
        self._record = record
        needed = memory.merge_by_peft(base.parameters, in_float32=True, dequantizes=dequantizes)
        self._arithmetic = torch.float32 if needed <= machine.free_memory() else self._stored
        with progress("loading the base", None):
            model = load_model(base.folder, self._arithmetic, trust_remote_code=trust_remote_code)
        self._model = PeftModel.from_pretrained(model, adapter).eval()
        _refuse_partial(self._model, adapter)
        self.layers = {name: module for name, module in self._model.named_modules() if isinstance(module, LoraLayer)}
        self._before: dict[str, Any] = {}

    @property
    def arithmetic(self) -> str:
        """The type that is summed in."""
        return str(self._arithmetic).removeprefix("torch.")

    def losses(self, what: str, rows: Rows, update: Callable[[float], None]) -> list[RowLoss]:
        """The held-out loss on rows.

        Args:
            what: "base", "16bit" or "dequantized": the base alone, or the adapter on one of both bases.
            rows: token ids and labels.
            update: called with the number of rows that are done.
        """
        if what == "base":
            with self._model.disable_adapter():
                return held_out_losses(self._model, rows, update)
        self.take(what)
        return held_out_losses(self._model, rows, update)

    def take(self, what: str) -> None:
        """Have "16bit" or "dequantized" weights under the adapter."""
        if what == "dequantized" and not self._before:
            dequantize_base(self._model, self._record, self._before)
        elif what == "16bit" and self._before:
            restore_base(self._model, self._before)
            self._before = {}

    def merge(self, folder: Path) -> dict[str, float]:
        """Merge, round and save; return the norms of the "change", of the "base" and of what "rounding" took off.

        Raises:
            PipelineError: a module's adapter changes nothing, something was left out, or a number is not finite.
        """
        import torch

        change, size = 0.0, 0.0
        with torch.no_grad(), progress("measuring the change", len(self.layers), "modules") as update:
            for done, (name, layer) in enumerate(self.layers.items(), 1):
                delta = layer.get_delta_weight("default").float().norm().item()
                if not 0 < delta < float("inf"):
                    raise changes_nothing(name)
                change += delta**2
                size += layer.get_base_layer().weight.float().norm().item() ** 2
                update(done)
        with progress("merging", None):
            model = self._model.merge_and_unload(safe_merge=True)
        left = [name for name, _ in model.named_parameters() if "lora_" in name]
        if left:
            raise PipelineError(f"the merge left parts of the adapter behind: {left[0]} and {len(left) - 1} more")
        rounding = _round_to(model, self._stored, {name.removeprefix("base_model.model.") for name in self.layers})
        model.config.dtype = self._stored
        with progress("saving", None):
            model.save_pretrained(folder, max_shard_size="4GB")
        return {"change": math.sqrt(change), "base": math.sqrt(size), "rounding": rounding}


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

"""An adapter as the plainest one that adds the same: what llama.cpp's converter takes, and a GGUF adapter can hold.

A GGUF adapter has two matrices for each module and one alpha; llama.cpp adds alpha / rank x B A. So every other
scaling, rsLoRA's and those by pattern, is worked into B:

    B' = scaling x rank / alpha x B

which is B itself for plain LoRA. The names are those of the base's files, which the converter knows. Where the files
hold a matrix transposed, as GPT-2's do, the adapter's transposes change places: (B A)^T = A^T B^T.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.model.adapter_file import AdapterFile, plain_name, renaming
from pipeline.model.nf4 import Record
from pipeline.model.weights_file import Weights

A, B = ".lora_A.weight", ".lora_B.weight"


def more_than_products(settings: dict[str, Any], names: Iterable[str]) -> str | None:
    """What an adapter does beside adding a product of two matrices to matrices of the base; None for nothing.

    Args:
        settings: adapter_config.json.
        names: its tensors'.
    """
    more = sorted(name for name in names if not name.endswith((A, B)))
    if settings.get("use_dora"):
        return "it is DoRA (use_dora), which scales every row of the sum as well"
    if settings.get("bias", "none") != "none":
        return f'it trained biases (bias = "{settings["bias"]}")'
    if saved := settings.get("modules_to_save"):
        return f"it has whole modules of its own (modules_to_save: {', '.join(saved)})"
    if settings.get("trainable_token_indices"):
        return "it trained single tokens (trainable_token_indices)"
    return f"it holds {more[0]}" if more else None


def refuse_for_gguf(folder: Path, settings: dict[str, Any], names: Iterable[str]) -> None:
    """Refuse an adapter that a GGUF file cannot hold.

    Args:
        folder: the adapter's.
        settings: adapter_config.json.
        names: its tensors'.

    Raises:
        UserError: with what it does.
    """
    if why := more_than_products(settings, names):
        raise UserError(
            f"{folder}: {why}, and a GGUF adapter holds two matrices for each module and nothing else: take "
            'export.as = "merged"'
        )


def write_plain(adapter: AdapterFile, record: Record, base: Weights, folder: Path) -> int:
    """Write the plain adapter.

    Args:
        adapter: the trained one.
        record: how the base's modules are.
        base: the base's files.
        folder: a new one.

    Returns:
        How many numbers its B matrices hold together: none of them may be lost on the way.

    Raises:
        UserError: a GGUF adapter cannot hold it.
    """
    from safetensors.torch import save_file

    settings, stored = adapter.settings, adapter.weights
    refuse_for_gguf(adapter.folder, settings, stored.shapes)
    modules = {plain_name(name).removesuffix(A): name.removesuffix(A) for name in stored.shapes if name.endswith(A)}
    names_of = renaming(modules, base)
    tensors: dict[str, Any] = {}
    numbers = 0
    for module, stem in modules.items():
        a, b = stored[stem + A], stored[stem + B]
        # In the order that is exactly 1 for alpha / rank.
        factor = adapter.scaling(module) / (settings["lora_alpha"] / a.shape[0])
        if factor != 1:
            b = b.float() * factor
        if module in record.transposed:
            a, b = b.T, a.T
        name = f"base_model.model.{names_of.to_file(module)}"
        tensors |= {name + A: a.contiguous(), name + B: b.contiguous()}
        numbers += b.numel()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    kept = {"peft_type": "LORA", "r": settings["r"], "lora_alpha": settings["lora_alpha"]}
    (folder / "adapter_config.json").write_text(json.dumps(kept) + "\n", encoding="utf-8")
    return numbers

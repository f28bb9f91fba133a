"""One step of training of small bases in Unsloth's 4 bits: `python -m support.one_step FOLDER...`.

A process of its own, because Unsloth changes the libraries that are imported after it. For each folder it prints a line
of JSON: the modules that Unsloth would train, those that merge would load, of the adapter's B matrices how many there
are and how many a step changes, and how far what merge unpacks of 4 bits is from what Unsloth computes with.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.config import Lora


def unpacked_otherwise(model: Any, folder: Path) -> dict[str, float]:
    """Of every weight in 4 bits: the largest difference from what merge makes of it, in parts of its largest number."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    from pipeline.model.adapter_file import renaming, stored_as
    from pipeline.model.nf4 import Kept, Record
    from pipeline.model.weights_file import read_weights

    record, base = Record.of(model), read_weights(folder)
    names = renaming(record.in_4bit, base)
    kept = Kept(base, record, names)
    found = {}
    for name, weight in model.named_parameters():
        if (of := name.removesuffix(".weight")) in record.in_4bit:
            theirs = dequantize_4bit(weight.data, weight.quant_state).float()
            theirs = (theirs.T if of in record.transposed else theirs).reshape(-1)
            ours = torch.cat([kept[part].reshape(-1) for part in stored_as(name, base, names)])
            found[of] = float((ours - theirs).abs().max() / theirs.abs().max())
    return found


def step(folder: Path) -> dict[str, Any]:
    """What a step does to a base."""
    import torch
    from unsloth import FastLanguageModel

    from pipeline.model import targets

    lora = Lora(r=4)
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=True, use_gradient_checkpointing=False, use_exact_model_name=True
    )
    unpacked = unpacked_otherwise(model, folder)
    chosen, merged = targets.find(model, lora), targets.of_base(folder, lora)
    model = FastLanguageModel.get_peft_model(
        model, r=4, target_modules=chosen.peft, use_gradient_checkpointing=False, max_seq_length=64
    )
    ids = torch.arange(100, 148).reshape(2, 24)
    model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
    changed = [bool(weight.grad.any()) for name, weight in model.named_parameters() if "lora_B" in name]
    return {
        "trained": sorted(chosen.modules),
        "merged": sorted(merged.modules),
        "changed": changed,
        "unpacked": unpacked,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as compiled:
        os.environ.update(UNSLOTH_COMPILE_LOCATION=compiled, UNSLOTH_DISABLE_STATISTICS="1")
        import unsloth  # noqa: F401

        for name in sys.argv[1:]:
            print("\n" + json.dumps(step(Path(name))))

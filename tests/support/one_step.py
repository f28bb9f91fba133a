"""One step of training of small bases in Unsloth's 4 bits: `python -m support.one_step FOLDER...`.

A process of its own, because Unsloth changes the libraries that are imported after it. For each folder it prints a line
of JSON: the modules that Unsloth would train, those that merge would load, and of the adapter's B matrices how many
there are and how many a step changes.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.config import Lora


def step(folder: Path) -> dict[str, Any]:
    """What a step does to a base."""
    import torch
    from unsloth import FastLanguageModel

    from pipeline.model import targets

    lora = Lora(r=4)
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=True, use_gradient_checkpointing=False, use_exact_model_name=True
    )
    chosen, merged = targets.find(model, lora), targets.of_base(folder, lora)
    model = FastLanguageModel.get_peft_model(
        model, r=4, target_modules=chosen.peft, use_gradient_checkpointing=False, max_seq_length=64
    )
    ids = torch.arange(100, 148).reshape(2, 24)
    model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
    changed = [bool(weight.grad.any()) for name, weight in model.named_parameters() if "lora_B" in name]
    return {"trained": sorted(chosen.modules), "merged": sorted(merged.modules), "changed": changed}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as compiled:
        os.environ.update(UNSLOTH_COMPILE_LOCATION=compiled, UNSLOTH_DISABLE_STATISTICS="1")
        import unsloth  # noqa: F401

        for name in sys.argv[1:]:
            print("\n" + json.dumps(step(Path(name))))

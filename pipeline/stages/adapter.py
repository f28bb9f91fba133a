"""adapter: what stands in the place of training where `[adapter] path` gives one that was trained elsewhere.

It is judged before anything else is done (`pipeline.model.adapter`), and written down as training would leave its own:
with the modules by name and the tokenizer that it is served with. Every later stage reads the one as the other.
"""

from __future__ import annotations

from typing import Any

from pipeline.console import progress
from pipeline.model.adapter import fit_to, read_given_adapter, write_taken
from pipeline.model.base import base_folder
from pipeline.model.facts import base_files
from pipeline.model.four_bit import is_4bit
from pipeline.model.plain_adapter import refuse_for_gguf
from pipeline.model.trained_tokenizer import adapter_files, trained_tokenizer
from pipeline.run.stage import Stage, Task


def main(task: Task) -> dict[str, Any]:
    """Judge the adapter, and write it down with its tokenizer."""
    model, folder = task.config.model, task.config.adapter.path
    assert folder is not None
    base = base_folder(model)
    with progress("judging the adapter", None):
        adapter = read_given_adapter(folder)
        if task.config.export.as_ == "adapter":
            refuse_for_gguf(folder, adapter.settings, list(adapter.weights.shapes))
        in_4bit = task.config.train.load_in_4bit and not is_4bit(base)
        fit = fit_to(adapter, base, in_4bit=in_4bit, trust_remote_code=model.trust_remote_code)
        tokenizer, said = trained_tokenizer(task.config)
    for words in (*adapter.remarks, *said):
        task.warn(words)
    write_taken(adapter, fit, tokenizer, task.new(task.layout.adapter), model.base)
    return {
        "from": str(folder),
        "base": adapter.named_base or None,
        "modules": len(fit.modules),
        "rank": adapter.settings["r"],
        "alpha": adapter.settings["lora_alpha"],
        "saved_modules": sorted(adapter.settings.get("modules_to_save") or ()),
        "trained_parameters": adapter.weights.stored_values,
    }


STAGE = Stage(
    name="train",
    summary="Take in a LoRA adapter that was trained elsewhere.",
    run=main,
    settings=("model", "train.load_in_4bit", "export.as"),
    indifferent_to=("adapter.path",),
    files=lambda config, _: [*base_files(config.model), *adapter_files(config)],
    libraries=("torch", "transformers", "peft", "tokenizers", "safetensors"),
    figures=("from", "base", "modules", "rank", "alpha", "trained_parameters"),
    judged=True,
)

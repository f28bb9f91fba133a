"""adapter: what stands in the place of training where the configuration gives one, or several to combine.

Each is judged before anything else is done (`pipeline.model.adapter_folder`). The one, or what they are combined to
(`pipeline.model.combined_adapter`), is written down as training would leave its own: with the modules by name and the
tokenizer that it is served with. Every later stage reads the one as the other.
"""

from __future__ import annotations

from typing import Any

from pipeline.console import progress
from pipeline.model.adapter_folder import fit_to, write_taken
from pipeline.model.base import base_folder
from pipeline.model.combined_adapter import read_given_adapters, write_combined
from pipeline.model.facts import base_files
from pipeline.model.merge_target import has_two_bases
from pipeline.model.plain_adapter import refuse_for_gguf
from pipeline.model.trained_tokenizer import adapter_files, trained_tokenizer
from pipeline.run.stage import Stage, Task


def main(task: Task) -> dict[str, Any]:
    """Judge the adapters, combine them where there are several, and write the one down with its tokenizer."""
    config, model = task.config, task.config.model
    base = base_folder(model)
    in_4bit = has_two_bases(config)
    with progress("judging the adapter", None):
        given = read_given_adapters(config)
        for adapter in given:
            if config.export.as_ == "adapter":
                refuse_for_gguf(adapter.folder, adapter.settings, adapter.weights.shapes)
            fit = fit_to(adapter, base, in_4bit=in_4bit, trust_remote_code=model.trust_remote_code)
        tokenizer, said = trained_tokenizer(config)
    for words in dict.fromkeys([*(words for adapter in given for words in adapter.remarks), *said]):
        task.warn(words)
    if config.adapters:
        with progress("combining the adapters", 100, "%") as update:
            adapter = write_combined(config, given, task.scratch / "combined", lambda share: update(100 * share))
        fit = fit_to(adapter, base, in_4bit=in_4bit, trust_remote_code=model.trust_remote_code)
    write_taken(adapter, fit, tokenizer, task.new(task.layout.adapter), model.base)
    return {
        "from": ", ".join(map(str, config.given_adapters)),
        **({"combined": config.adapter.combine} if config.adapters else {}),
        "base": adapter.named_base or None,
        "modules": len(fit.modules),
        "rank": adapter.settings["r"],
        "alpha": adapter.settings["lora_alpha"],
        "saved_modules": sorted(adapter.settings.get("modules_to_save") or ()),
        "trained_parameters": adapter.weights.stored_values,
    }


STAGE = Stage(
    name="train",
    summary="Take in a LoRA adapter that was trained elsewhere, or several combined into one.",
    run=main,
    # A single adapter may lie elsewhere; of several, each weight belongs to a folder.
    settings=("model", "adapter", "adapters", "train.seed", "train.load_in_4bit", "export.as"),
    indifferent_to=("adapter.path",),
    files=lambda config, _: [*base_files(config.model), *adapter_files(config)],
    libraries=("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors"),
    figures=("from", "combined", "base", "modules", "rank", "alpha", "trained_parameters"),
    judged=True,
)

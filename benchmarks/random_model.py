"""A Llama of a given size with random weights and a real tokenizer: `python -m benchmarks.random_model --help`.

What exporting costs depends on shapes and types, not on what a model has learned. Weights are written layer by layer.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import click

LAYER = 14.5  # weights of a layer in squares of the hidden size: attention 2.5 (few key-value heads), MLP 12
ASPECT = 100  # hidden size to layers, as models have it from 100 million to 70 billion parameters


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--parameters", type=float, required=True, help="How many weights, e.g. 1.3e9.")
@click.option("--tokenizer", required=True, help="A packaged base, or a tokenizer of third_party/pins.toml.")
def main(folder: Path, parameters: float, tokenizer: str) -> None:
    """Write the model to FOLDER, in bfloat16."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = _tokenizer(tokenizer)
    vocabulary = AutoTokenizer.from_pretrained(source)
    words = math.ceil(len(vocabulary) / 64) * 64
    hidden, layers = shape(parameters, words)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(config).named_parameters()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)

    torch.manual_seed(0)
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    places: dict[str, str] = {}
    for part, names in parts.items():
        weights: dict[str, Any] = {name: torch.randn(shapes[name], dtype=torch.bfloat16) * 0.02 for name in names}
        weights |= {name: torch.ones(shapes[name], dtype=torch.bfloat16) for name in names if "norm" in name}
        save_file(weights, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
        places |= dict.fromkeys(names, f"model-{part}.safetensors")
    count = sum(math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * count}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    print(f"{count / 1e9:.3f} billion parameters: {layers} layers of {hidden}, {words} words")


def shape(parameters: float, words: int) -> tuple[int, int]:
    """The hidden size, a multiple of 256 so that every K-quant fits, and the layers that come nearest to a size.

    Args:
        parameters: how many weights.
        words: the size of the vocabulary, whose embeddings are tied.
    """
    candidates = []
    for hidden in range(256, 16384 + 1, 256):
        layers = round((parameters - words * hidden) / (LAYER * hidden**2))
        if layers >= 1:
            candidates.append((abs(math.log(hidden / layers / ASPECT)), hidden, layers))
    if not candidates:
        raise click.UsageError(f"--parameters {parameters:g}: the embeddings of {words} words alone are more")
    _, hidden, layers = min(candidates)
    return hidden, layers


def _tokenizer(name: str) -> Path:
    from pipeline.model.base import resolve_base
    from pipeline.model.packaged import PACKAGED
    from pipeline.setup.pins import load_pins
    from pipeline.setup.places import tokenizer_folder

    if name in PACKAGED:
        return resolve_base(name)
    if name not in load_pins().tokenizers:
        known = ", ".join([*PACKAGED, *load_pins().tokenizers])
        raise click.UsageError(f"--tokenizer {name}: known are {known}")
    folder = tokenizer_folder(name)
    if folder is None:
        raise click.UsageError(f"--tokenizer {name}: it is not on this machine yet: run `pipeline setup --dev`")
    return folder


if __name__ == "__main__":
    main()

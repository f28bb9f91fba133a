"""What a model needs of the memory when it is loaded, merged or asked, and of the disk. Sizes in bytes.

Every formula leaves room for what comes beside the weights. Training is counted in `training_memory`; what the machine
has is asked in `pipeline.setup`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.figures import GIB
from pipeline.model.predict import TOGETHER
from pipeline.model.weights_file import read_weights
from pipeline.setup import gpu, machine

_LIBRARIES = int(0.6 * GIB)  # what torch takes before anything is computed
_LAYER = re.compile(r".*?\.\d+\.")  # what the name of a tensor in a layer begins with


def float32_model(parameters: float) -> int:
    """A model in float32: 4 bytes for each parameter, and a tenth for the activations of some short rows."""
    return int(4.4 * parameters)


def fits_float32(folder: Path) -> bool:
    """Whether a folder's model fits into the free memory in float32."""
    return float32_model(read_weights(folder).parameters) <= machine.free_memory()


def merge_by_peft(parameters: float, *, in_float32: bool, dequantizes: bool) -> int:
    """Merging an adapter with the whole model in memory.

    Args:
        parameters: of the base.
        in_float32: the weights are summed in float32; else in 16 bits, which is the least that a merge needs.
        dequantizes: the adapter was trained on 4 bits. Then the 16-bit weights of before are kept beside those that
            NF4 leaves of them, until the losses of both are known.
    """
    # 0.3 of the weights: the delta of the largest module, its sum, and a shard that is being written.
    return int(parameters * (1.3 * (4 if in_float32 else 2) + (2 if dequantizes else 0)))


def merge(base: Mapping[str, Sequence[int]], *, measures: bool) -> int:
    """Merging an adapter tensor by tensor.

    Args:
        base: the shapes of its own tensors, by name.
        measures: the adapter was trained on 4 bits: both bases are measured layer by layer, and a matrix is dequantized
            whole, by two threads at once; a layer's experts are, as they were packed, together.
    """
    if not measures:
        return _LIBRARIES + GIB // 4  # a few pieces of 16 MiB for each thread
    matrix, experts = 0, Counter[str]()
    for name, shape in base.items():
        if (within := _LAYER.match(name)) and ".experts." in name:
            experts[within[0]] += math.prod(shape)
        elif within:
            matrix = max(matrix, math.prod(shape))
    return max(by_layers(base) + 3 * 4 * max(experts.values(), default=0), _LIBRARIES + 2 * 5 * 4 * matrix)


def by_layers(model: Mapping[str, Sequence[int]]) -> int:
    """The logits of a model that is never loaded whole: its largest part in float32, and those of a batch."""
    parts: Counter[str] = Counter()
    for name, shape in model.items():
        within = _LAYER.match(name)
        parts[within[0] if within else name] += math.prod(shape)
    words = max((shape[0] for name, shape in model.items() if "embed" in name or "head" in name), default=0)
    return _LIBRARIES + int(1.3 * 4 * max(parts.values())) + 2 * 4 * TOGETHER * words


def asked_model(parameters: float) -> int:
    """A model in 16 bits that answers: 2 bytes for each parameter, a tenth, and a GiB for its cache of keys."""
    return int(2.2 * parameters) + GIB


def answers_together(model: Any, tokens: int, most: int = 32) -> int:
    """How many answers fit into half of the free memory at once.

    Args:
        model: a loaded transformers model.
        tokens: of the longest question and its answer.
        most: more is not faster.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):  # another architecture: what it keeps does not grow with the tokens
        return most
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    row = tokens * 2 * config.num_hidden_layers * kept * width * model.dtype.itemsize  # keys and values
    free = gpu.free_memory() if model.device.type == "cuda" else machine.free_memory()
    return max(1, min(most, free // 2 // row))


def sixteen_bit_file(parameters: float) -> int:
    """A model on the disk, as a Hugging Face folder or a GGUF file: 2 bytes for each parameter."""
    return int(2 * parameters)


def float32_file(parameters: float) -> int:
    """The same in float32."""
    return 2 * sixteen_bit_file(parameters)


def quantized_file(parameters: float, bits: float | None) -> int:
    """A quantized GGUF file.

    Args:
        parameters: of the model.
        bits: what its type promises for each parameter; None where it promises nothing. Taken generously: on small
            models many tensors fall back to larger types.
    """
    return int(parameters * (max(bits or 16.0, 4.5) + 0.5) / 8)


def disk(
    parameters: float, quantized: Sequence[int], *, served_here: bool, apart: bool = False, keeps_merged: bool = True
) -> dict[str, int]:
    """What each stage writes and keeps, and the most that one of them needs on the way.

    Args:
        parameters: of the model.
        quantized: the sizes of the quantized files.
        served_here: Ollama keeps its models on this disk.
        apart: the adapter is served beside its base: both the base and the merged model are converted again.
        keeps_merged: the merged weights stay.
    """
    sixteen_bit = sixteen_bit_file(parameters)
    # A native template is put into a copy of the file; Ollama keeps one of its own, and a second while it is proven.
    return {
        "checkpoints": int(0.2 * sixteen_bit),
        "merge": keeps_merged * sixteen_bit,
        "convert": sixteen_bit,
        "quantize": sum(quantized),
        "modelfile": sum(quantized),
        "deploy": sum(quantized) + max(quantized) if served_here else 0,
        # The model converted again, with an adapter apart the merged one too, the 16-bit file in float32, and
        # llama-perplexity's reference. Merged weights that go were converted again by `convert`, when there were no
        # other files yet.
        "verify": (keeps_merged + apart) * sixteen_bit + float32_file(parameters) + GIB,
    }


def untouched_base(parameters: float, quantized: Sequence[int]) -> int:
    """What preflight writes: the base converted, that in float32, and every type twice: quantized, and in Ollama."""
    return sixteen_bit_file(parameters) + float32_file(parameters) + 2 * sum(quantized)

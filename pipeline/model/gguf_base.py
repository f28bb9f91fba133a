"""A GGUF file as a base: written once as a folder that training, PEFT and llama.cpp's converter read alike.

The one idea here: undo, exactly, what made the file - dequantize the weights, put the rotary rows back in the order of
the `transformers` library, rebuild the tokenizer from its own tokens and merges - so that converting the result again
gives the file's own tokens and the file's own answers. Neither is left to `transformers`' GGUF loader: its Llama ends
texts at BOS, splits Llama 3's digits and Qwen's special tokens otherwise, and forgets how Llama 3.1 scales its rotary
positions. What cannot be undone exactly is refused, by the key or the tensor that says so.

Quantized weights are stored as float16. Four-bit weights times a float16 scale need more bits than any 16-bit type
has, and float16 keeps three more of them than bfloat16; the largest weight is far from its limit, which is checked.
Other files keep their type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.gguf_file import GGUFInfo, TensorInfo, inspect
from pipeline.model.derived_folder import derived_folder, name_for
from pipeline.model.gguf_tokenizer import INSTEAD, refuse_other_tokens, special_ids, tokenizer_of
from pipeline.model.weights_file import STORED_TYPES
from pipeline.model.weights_writer import TensorPlan, WeightsWriter
from pipeline.processes import require_space

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Part of the cache's folder name: a change of what is written below needs a new number.
LAYOUT = 3

_WHOLE_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROTARY_FACTORS = "rope_freqs.weight"
# What the file says of the architecture, beside what is written into config.json under another name.
_COUNTS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_OTHERS = (
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
)
# The scaling of every Llama 3.1, 3.2 and 3.3; the factor is in the file.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Architecture:
    """What one architecture has beside what all of these have.

    Attributes:
        model: the class of `transformers`.
        in_block: further tensors of a block: the file's name -> the module or parameter.
        interleaved: llama.cpp has the rows of queries and keys in another order.
    """

    model: str
    in_block: tuple[tuple[str, str], ...] = ()
    interleaved: bool = False


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", interleaved=True),
    "qwen2": Architecture(
        "Qwen2ForCausalLM", tuple((f"attn_{part}.bias", f"self_attn.{part}_proj.bias") for part in "qkv")
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM", tuple((f"attn_{part}_norm.weight", f"self_attn.{part}_norm.weight") for part in "qk")
    ),
}


def is_gguf(path: Path) -> bool:
    """Whether a file calls itself GGUF, by its name or by its first bytes."""
    if path.suffix.lower() == ".gguf" or not path.is_file():
        return path.is_file()
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def gguf_folder(path: Path) -> Path:
    """The folder of a base that is a GGUF file, written first if it is not there yet.

    Raises:
        UserError: the file is damaged, holds no whole model, or one that cannot be rebuilt exactly.
    """
    read(path)
    name = name_for(f"{path.stem}-from-gguf", [path], LAYOUT)
    return derived_folder(name, f"unpacking {path.name}, once", partial(write, path))


def facts_of(path: Path) -> tuple[int, int]:
    """The number of weights and the context length in tokens, from the header."""
    info = read(path)
    parameters = sum(info.names[name].elements for name in _places(info))
    return parameters, int(info.metadata[f"{info.architecture}.context_length"])


def quantized_type(path: Path) -> str:
    """The type that the file's weights were rounded to, e.g. "Q4_K_M"; "" for 16 and 32 bits."""
    from gguf import LlamaFileType

    info = read(path)
    if not any(tensor.storage.quantized for tensor in info.tensors):
        return ""
    try:
        return LlamaFileType(info.metadata.get("general.file_type", -1)).name.removeprefix("MOSTLY_")
    except ValueError:  # a mix of somebody's own
        return next(kind for kind in info.parameters_by_type if kind != "f32").upper()


def read(path: Path) -> GGUFInfo:
    """The file's header, if a base can be made of it.

    Raises:
        UserError: with what to give instead.
    """
    try:
        info = inspect(path)
    except PipelineError as error:
        raise UserError(f"model.base: {error}") from None
    where, kind = f"model.base: {path}", info.metadata.get("general.type", "model")
    if kind == "adapter":
        raise UserError(f"{where}: is an adapter, not a model: give the base that the adapter was trained on")
    if kind == "mmproj" or info.architecture == "clip":
        raise UserError(f"{where}: is a projector for images (mmproj), not a model: give the language model's file")
    if kind != "model" or not info.tensors:
        raise UserError(f"{where}: holds no model ({kind}, {len(info.tensors)} tensors): {INSTEAD}")
    if (parts := info.metadata.get("split.count", 1)) > 1:
        raise UserError(
            f"{where}: is one of {parts} parts: join them first (llama-gguf-split --merge FIRST-PART WHOLE.gguf)"
        )
    if info.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"{where}: is of the architecture {info.architecture}; of a GGUF file {known} can be: {INSTEAD}"
        )
    _refuse_other_settings(info)
    _refuse_other_tensors(info)
    special_ids(info)
    return info


def write(path: Path, folder: Path, pad_token: str | None = None) -> None:
    """Write a file's model as a folder.

    Args:
        path: the GGUF file.
        folder: does not exist yet.
        pad_token: instead of the file's.

    Raises:
        UserError: it cannot be done exactly.
    """
    info = read(path)
    stored = _stored_type(info)
    require_space(folder.parent, STORED_TYPES[stored][1] * info.parameter_count, f"{path.name} unpacked")
    folder.mkdir()
    tokenizer = tokenizer_of(info, pad_token)
    refuse_other_tokens(info, tokenizer)
    tokenizer.save_pretrained(folder)
    _write_config(info, stored, tokenizer, folder)
    _write_weights(info, stored, folder)


def _setting(info: GGUFInfo, name: str, default: Any = None) -> Any:
    value = info.metadata.get(f"{info.architecture}.{name}", default)
    if value is None:
        raise UserError(f"model.base: {info.path}: the key {info.architecture}.{name} is missing: {INSTEAD}")
    return value


def _refuse_other_settings(info: GGUFInfo) -> None:
    """Refuse what would have to be left out of config.json."""
    prefix = f"{info.architecture}."
    for key, value in info.metadata.items():
        unknown = key.removeprefix(prefix) not in (*_COUNTS, *_OTHERS)
        if key.startswith(prefix) and ((unknown and value not in (0, "none", "")) or isinstance(value, list)):
            raise UserError(f"model.base: {info.path}: {key} = {value}: such a model cannot be rebuilt: {INSTEAD}")
    for name in _COUNTS:
        _setting(info, name)
    heads, width = _setting(info, "attention.head_count"), _head_width(info)
    wanted = (("attention.value_length", width), ("rope.dimension_count", width))
    for name, expected in wanted:
        if (found := _setting(info, name, expected)) != expected:
            raise UserError(
                f"model.base: {info.path}: {prefix}{name} is {found}, and the keys of its {heads} heads are {expected} "
                f"wide: such a model cannot be rebuilt: {INSTEAD}"
            )


def _refuse_other_tensors(info: GGUFInfo) -> None:
    expected = set(_places(info))
    if missing := sorted(expected - set(info.names)):
        raise UserError(f"model.base: {info.path}: the tensor {missing[0]} is missing ({len(missing)} are): {INSTEAD}")
    if more := sorted(set(info.names) - expected - {_ROTARY_FACTORS}):
        raise UserError(
            f"model.base: {info.path}: holds {more[0]}, which a plain {info.architecture} has not ({len(more)} such "
            f"tensors): {INSTEAD}"
        )
    _rotary_positions(info)


def _head_width(info: GGUFInfo) -> int:
    equal_part = _setting(info, "embedding_length") // _setting(info, "attention.head_count")
    return int(_setting(info, "attention.key_length", equal_part))


def _places(info: GGUFInfo) -> dict[str, str]:
    """The file's tensors -> the parameters of `transformers`, in that library's order."""
    architecture = ARCHITECTURES[info.architecture]
    in_block = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in _IN_BLOCK.items()}
    in_block |= dict(architecture.in_block)
    whole = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in _WHOLE_MODEL.items()}
    if "output.weight" not in info.names:  # the head is the embedding
        del whole["output.weight"]
    return whole | {
        f"blk.{block}.{ours}": f"model.layers.{block}.{theirs}"
        for block in range(_setting(info, "block_count"))
        for ours, theirs in in_block.items()
    }


def _rotary_positions(info: GGUFInfo) -> dict[str, Any]:
    """rope_parameters of config.json. The file has Llama 3.1's scaling as one factor for every frequency."""
    import numpy as np

    theta = _exact(_setting(info, "rope.freq_base", 10000.0))
    if _ROTARY_FACTORS not in info.names:
        return {"rope_type": "default", "rope_theta": theta}
    factors = info.values(info.names[_ROTARY_FACTORS])
    scaling = {**_LLAMA3, "factor": float(factors.max())}
    if not np.array_equal(_llama3_factors(theta, _head_width(info), scaling), factors):
        raise UserError(
            f"model.base: {info.path}: {_ROTARY_FACTORS} does not scale positions as Llama 3.1 does: {INSTEAD}"
        )
    return {"rope_type": "llama3", "rope_theta": theta, **scaling}


def _llama3_factors(theta: float, width: int, scaling: dict[str, Any]) -> NDArray[np.float32]:
    """What llama.cpp's converter writes for a scaling (generate_extra_tensors in conversion/llama.py)."""
    import numpy as np
    import torch

    factor, low, high = (scaling[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = scaling["original_max_position_embeddings"]
    factors = []
    for frequency in 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width):
        length = 2 * np.pi / frequency
        smooth = min(1, max(0, (original / length - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32).numpy()


def _exact(number: float) -> float:
    """The file holds a float32: its shortest decimal is the number that was meant."""
    import numpy as np

    return float(str(np.float32(number)))


def _stored_type(info: GGUFInfo) -> str:
    kinds = {tensor.type for tensor in info.tensors if len(tensor.shape) > 1}
    return {"f32": "F32", "bf16": "BF16"}.get(kinds.pop() if len(kinds) == 1 else "", "F16")


def _write_config(info: GGUFInfo, stored: str, tokenizer: Any, folder: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
        for name in ("bos", "eos", "pad")
        if getattr(tokenizer, f"{name}_token_id") is not None
    }
    heads = _setting(info, "attention.head_count")
    config = AutoConfig.for_model(
        info.architecture,
        architectures=[ARCHITECTURES[info.architecture].model],
        dtype=STORED_TYPES[stored][0],
        vocab_size=info.names["token_embd.weight"].shape[1],
        num_key_value_heads=_setting(info, "attention.head_count_kv", heads),
        head_dim=_head_width(info),
        rms_norm_eps=_exact(_setting(info, "attention.layer_norm_rms_epsilon")),
        rope_parameters=_rotary_positions(info),
        tie_word_embeddings="output.weight" not in info.names,
        **{theirs: _setting(info, ours) for ours, theirs in _COUNTS.items()},
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | special,
    )
    config.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)


def _write_weights(info: GGUFInfo, stored: str, folder: Path) -> None:
    import torch

    places = _places(info)
    tensors = {theirs: info.names[ours] for ours, theirs in places.items()}
    plans = {name: TensorPlan("model.safetensors", stored, tensor.shape[::-1]) for name, tensor in tensors.items()}
    kind = getattr(torch, STORED_TYPES[stored][0])
    with WeightsWriter(folder, plans) as writer:
        for name, tensor in tensors.items():
            row = 0
            for values in _rows(info, tensor):
                written = torch.tensor(values).to(kind)  # the file's bytes are read-only
                if not written.isfinite().all():
                    raise UserError(
                        f"model.base: {info.path}: {tensor.name} holds a number beyond {STORED_TYPES[stored][0]}"
                    )
                writer.write(name, row, written)
                row += len(values)


def _rows(info: GGUFInfo, tensor: TensorInfo) -> Iterator[NDArray[np.float32]]:
    """A tensor's rows in the order of `transformers`, some at a time."""
    part = tensor.name.split(".")[-2]
    if ARCHITECTURES[info.architecture].interleaved and part in ("attn_q", "attn_k"):
        heads = _setting(info, "attention.head_count")
        count = heads if part == "attn_q" else _setting(info, "attention.head_count_kv", heads)
        yield unpermute(info.values(tensor), count)
    else:
        for piece in info.pieces(tensor):
            yield piece.reshape(-1, tensor.shape[0]) if len(tensor.shape) > 1 else piece


def unpermute(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's order of a query or key projection's rows.

    Its Llama rotates neighbouring rows of a head, `transformers` the two halves, so its converter interleaves
    the halves (`LlamaModel.permute` in conversion/llama.py).

    Args:
        rows: [heads * head size, inputs].
        heads: how many heads share the rows.
    """
    width = rows.shape[0] // heads
    return rows.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)

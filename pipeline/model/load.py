"""A transformers model, loaded: the base, an adapter on the base that it was trained on, or the merged model.

Where it is computed, and in which type, is decided here: on the GPU where there is one with room for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.model import memory, training_memory
from pipeline.model.base import base_folder
from pipeline.model.four_bit import is_4bit
from pipeline.model.nf4 import Record, dequantize_base
from pipeline.model.quiet import quiet_transformers
from pipeline.model.sixteen_bit_type import TORCH_TYPES
from pipeline.model.weights_file import Weights, read_weights
from pipeline.prompt.tokenizer import load_tokenizer, saved_tokenizer
from pipeline.setup import gpu

if TYPE_CHECKING:
    from pipeline.config import Model


def device_for(needed: int) -> str:
    """Where something is computed: "cuda" where so many bytes are free there, else "cpu"."""
    return "cuda" if needed < gpu.free_memory() else "cpu"


def compute_type(device: str) -> Any:
    """The type that a device computes fast: 16 bits where it has the circuits for them."""
    import torch

    if device == "cuda":
        # Emulated bfloat16, as on a T4, is slower than float16.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def load_model(folder: Path, dtype: Any, device: str = "cpu", *, trust_remote_code: bool = False, **more: Any) -> Any:
    """A folder's causal language model.

    Args:
        folder: with config.json and safetensors.
        dtype: a torch type, or "auto" for the stored one.
        device: "cpu" or "cuda".
        trust_remote_code: run the folder's own Python code.
        more: other arguments of transformers' `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM

    # bitsandbytes takes a GPU where no device is named; PEFT treats a model with a named CPU as an offloaded one.
    device_map = None if device == "cpu" and "quantization_config" not in more else device
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, **more
        )


def load_float32(folder: Path, **more: Any) -> Any:
    """A model with its stored numbers in float32, on the CPU, ready to be asked."""
    import torch

    return load_model(folder, torch.float32, **more).eval()


def round_matrices(model: Any, folder: Path, outtype: str) -> None:
    """Round a float32 model's matrices to the 16 bits that a GGUF file of it holds; other models stay as they are.

    What a 16-bit file of a float32 base loses in the rounding is no fault of the file, and not what it is judged for.

    Args:
        model: the folder's model in float32.
        folder: where it was loaded from.
        outtype: the file's type, "f32", "f16" or "bf16".
    """
    import torch

    weights = read_weights(folder)
    if outtype in TORCH_TYPES and weights.main_type == "F32":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(_rounded(parameter, outtype))


def rounded(weights: Weights, name: str, outtype: str) -> Any:
    """One tensor in float32, as `round_matrices` leaves it."""
    tensor = weights[name].float()
    return _rounded(tensor, outtype) if outtype in TORCH_TYPES and weights.main_type == "F32" else tensor


def _rounded(tensor: Any, outtype: str) -> Any:
    import torch

    if tensor.ndim < 2:  # the converter keeps vectors in float32
        return tensor
    return tensor.to(getattr(torch, TORCH_TYPES[outtype])).to(tensor.dtype)


def _load_stored(folder: Path, trust_remote_code: bool = False) -> Any:
    """A model as its folder has it. A CPU gets weights in 4 bits unpacked once, not anew for every token."""
    parameters, packed = read_weights(folder).parameters, is_4bit(folder)
    needed = training_memory.least_on_gpu(parameters, in_4bit=True) if packed else memory.asked_model(parameters)
    device = device_for(needed)
    compute = compute_type(device)
    model = load_model(folder, compute, device, trust_remote_code=trust_remote_code).eval()
    return model.dequantize(dtype=compute) if packed and device == "cpu" else model


def load_base(settings: Model) -> tuple[Any, Any]:
    """The untouched base, and the tokenizer that it is trained with."""
    folder, remote = base_folder(settings), settings.trust_remote_code
    tokenizer, _ = load_tokenizer(folder, trust_remote_code=remote, chat_template=settings.chat_template)
    return _load_stored(folder, remote), tokenizer


def load_merged(folder: Path) -> tuple[Any, Any]:
    """A merged model and its tokenizer."""
    return _load_stored(folder), saved_tokenizer(folder)


def load_adapter(settings: Model, adapter: Path, record: Record | None, *, tokenizer: Any = None) -> tuple[Any, Any]:
    """The adapter on the base that it was trained on, and the trained tokenizer.

    Args:
        settings: the base.
        adapter: a PEFT adapter's folder.
        record: which of the base's weights training had in 4 bits; None where it had them as they are stored.
        tokenizer: the trained one, for a folder that has none; None for its own.
    """
    from peft import PeftModel

    tokenizer = tokenizer or saved_tokenizer(adapter)
    model = load_base(settings)[0] if record is None else _load_4bit(settings, record)
    return PeftModel.from_pretrained(model, adapter).eval(), tokenizer


def _load_4bit(settings: Model, record: Record) -> Any:
    from transformers import BitsAndBytesConfig

    folder, remote = base_folder(settings), settings.trust_remote_code
    device = device_for(training_memory.least_on_gpu(read_weights(folder).parameters, in_4bit=True))
    if device == "cpu" or record.experts:  # a CPU would unpack them for every token; transformers packs no experts
        model = _load_stored(folder, remote)
        dequantize_base(model, record)
        return model
    compute = compute_type(device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return load_model(folder, compute, device, trust_remote_code=remote, quantization_config=quantization)

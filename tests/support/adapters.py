"""Small random models of several architectures, adapters of every kind on them, and PEFT's own merge as the measure."""

from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.05,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def random_base(folder: Path, model_type: str = "llama", dtype: str = "bfloat16", **sizes: Any) -> Path:
    """A model of two small layers, saved."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | sizes))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def rename_tensors(folder: Path, old: str, new: str) -> None:
    """Let the names in a model's file begin otherwise than in the loaded model."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def random_adapter(base: Path, folder: Path, **lora: Any) -> Path:
    """An adapter of a base whose every number is random, saved by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8} | lora))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.03)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Any]:
    """What `merge_and_unload` leaves of a model in float32: every tensor, not rounded, by its name in the model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval().merge_and_unload(safe_merge=True)
    return dict(model.named_parameters())

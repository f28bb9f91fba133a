"""Small random bases, adapters on them as others save them, by PEFT alone and by TRL, and PEFT's own merge."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.prompt.tokenizer import read_saved
from support.bases import short
from support.small_models import BASE, base_folder, scratch

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@cache
def small_base(*, tied: bool = True, hidden: int = 256, converts: bool = False) -> Path:
    """A Llama of two layers with rows of 256, so that K-quants apply, and the packaged base's tokenizer.

    That has a few thousand of its words, or all of them where the base is to be one that llama.cpp's converter knows.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = scratch() / f"small-base-{hidden}{'' if tied else '-untied'}{'-converts' if converts else ''}"
    tokenizer = base_folder() if converts else short(BASE)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        vocab_size=read_saved(tokenizer).size,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(tokenizer / name, folder / name)
    return folder


def peft_adapter(folder: Path, base: Path, **lora: Any) -> Path:
    """What a bare PEFT script leaves: `get_peft_model`, some steps, `save_pretrained`; no tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": MODULES, "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return folder


@cache
def trl_checkpoint() -> Path:
    """The last checkpoint of TRL's trainer on the small base: adapter, tokenizer, and the pickles of an optimizer."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

    class OnTheProcessor(SFTTrainer):
        """TRL's own loss needs a GPU."""

        compute_loss = Trainer.compute_loss

    folder = scratch() / "trl"
    messages = [[{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}"}] for n in range(4)]
    trainer = OnTheProcessor(
        model=str(small_base()),
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=2,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"messages": messages}),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return folder / "checkpoint-2"


# Without a tokenizer, of any architecture: for what becomes of the numbers.

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

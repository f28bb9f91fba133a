"""A small random base with a real tokenizer, and LoRA adapters on it as others save them: by PEFT alone, by TRL."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from support.small_models import base_folder, scratch

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@cache
def small_base(*, tied: bool = True, hidden: int = 256) -> Path:
    """A Llama of two layers with rows of 256, so that K-quants apply, and the packaged base's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = scratch() / f"small-base-{hidden}{'' if tied else '-untied'}"
    plain = json.loads((base_folder() / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        vocab_size=plain["vocab_size"],
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(base_folder() / name, folder / name)
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

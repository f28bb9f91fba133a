"""A bare Unsloth and TRL script: `python -m benchmarks.bare_train SETTINGS`.

SETTINGS is a JSON file: "base" (a folder), "rows" (an Arrow file of token ids and labels), "values" (what
`pipeline config --json` prints as such) and "result", a file that is given the seconds of the training.
"""

import json
import sys
from pathlib import Path

import unsloth  # noqa: F401  (first: it patches what is imported after it)
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
lora, train = given["values"]["lora"], given["values"]["train"]
rows = Dataset.from_file(given["rows"])
checkpointing = "unsloth" if train["gradient_checkpointing"] else False

model, _ = FastLanguageModel.from_pretrained(
    given["base"],
    max_seq_length=train["max_length"],
    load_in_4bit=train["load_in_4bit"],
    use_gradient_checkpointing=checkpointing,
    use_exact_model_name=True,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=lora["r"],
    lora_alpha=lora["alpha"],
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    use_gradient_checkpointing=checkpointing,
    random_state=train["seed"],
    max_seq_length=train["max_length"],
)
trainer = SFTTrainer(
    model=model,
    processing_class=AutoTokenizer.from_pretrained(given["base"]),
    train_dataset=rows,
    args=SFTConfig(
        output_dir=str(Path(given["result"]).with_suffix("")),
        per_device_train_batch_size=train["batch"],
        gradient_accumulation_steps=train["accumulation"],
        max_steps=train["steps"],
        learning_rate=train["learning_rate"],
        lr_scheduler_type=train["scheduler"],
        optim=train["optimizer"],
        max_length=train["max_length"],
        gradient_checkpointing=bool(train["gradient_checkpointing"]),
        seed=train["seed"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
)
seconds = trainer.train().metrics["train_runtime"]
Path(given["result"]).write_text(json.dumps(seconds), encoding="utf-8")

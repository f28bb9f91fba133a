"""A plain load and tokenize with the datasets library: `python -m benchmarks.bare_data BASE ROWS FOLDER`."""

import sys
from typing import Any

from datasets import load_dataset
from transformers import AutoTokenizer

base, rows, folder = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)


def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
    """The token ids of conversations, rendered by the base's chat template."""
    texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
    return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}


data = load_dataset("json", data_files=rows, split="train", cache_dir=folder)
data.map(tokenize, batched=True, remove_columns=data.column_names)

"""What one writes by hand to merge an adapter: `python -m benchmarks.bare_merge BASE ADAPTER OUTPUT`."""

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
AutoTokenizer.from_pretrained(adapter).save_pretrained(output)

"""Training by Unsloth's CUDA code, run on the processor: what stands in for the card is said in support/cuda_code.py.

Rows that are laid end to end, packed or padded are trained as each of them alone, which transformers without Unsloth
says; checkpoints are resumed to the same bytes. That this code is what ran is told by the calls of its kernels.
"""

import json
import os
import random
import subprocess
import sys
from array import array
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.adapters import random_base

from pipeline.data.token_file import TokenFile
from pipeline.model.load import load_float32
from pipeline.resources import sha256_of
from pipeline.run.layout import Layout

if find_spec("triton") is None:
    pytest.skip("torch without CUDA brings no Triton: Unsloth's CUDA code was not tried", allow_module_level=True)

WORDS = 512
ROWS, LONGEST = 6, 10
# Every step of these trains all rows, in whatever order and sequences: they all compute the same.
CONFIG = f"""
[model]
base = "base"
[data]
train = "rows.jsonl"
[lora]
r = 4
[train]
steps = 2
batch = {ROWS // 2}
accumulation = 2
learning_rate = 3e-2
warmup = 0
scheduler = "constant"
max_length = {LONGEST}
eval_interval = 2
save_interval = 2
optimizer = "adamw_torch"
load_in_4bit = false
gradient_checkpointing = false
"""
# These take several steps to see all rows, and are resumed in the middle.
SHORT = ["train.batch=2", "train.accumulation=1", "train.steps=4", "train.eval_interval=4"]
PACKED = "train.packing=true"
SHORT_PACKED = [*SHORT, PACKED, "train.batch=1"]
TRAININGS: list[dict[str, Any]] = [
    {"run": "joined"},
    {"run": "padded", "environment": {"UNSLOTH_PADDING_CHOICE": "padded"}},
    # Unsloth's own checkpointing begins with sequences of this length.
    {"run": "packed", "overrides": [PACKED, "train.gradient_checkpointing=true", "train.max_length=512"]},
    {"run": "four-bit", "overrides": ["train.load_in_4bit=true"]},
    {"run": "short", "overrides": SHORT},
    {"run": "short-resumed", "overrides": SHORT, "scratch": "short"},
    {"run": "short-packed", "overrides": SHORT_PACKED},
    {"run": "short-packed-resumed", "overrides": SHORT_PACKED, "scratch": "short-packed"},
]
SAME = ["joined", "padded", "packed"]
KERNELS = {"_rms_layernorm_forward", "_rope_embedding_QK", "_fg_kernel", "_DWf_DW_dfg_kernel"}
STEPS = {"LoRA_MLP.backward", "LoRA_QKV.backward", "LoRA_W.backward", "unsloth_fused_ce_loss"}


def made_up_rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Rows of which the second half is trained."""
    chance, rows = random.Random(seed), []
    for _ in range(count):
        ids = [chance.randrange(20, WORDS) for _ in range(chance.randrange(4, 7))]
        half = len(ids) // 2
        rows.append({"input_ids": ids, "labels": [-100] * half + ids[half:]})
    return rows


TRAIN, VALIDATION = made_up_rows(ROWS, 1), made_up_rows(2, 2)


def small_tokenizer(folder: Path) -> None:
    """A word for every byte, and an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all trainings done, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("cuda-code")
    sizes = {"vocab_size": WORDS, "num_hidden_layers": 1, "max_position_embeddings": 512}
    # bitsandbytes unpacks 4 bits wrongly on some processors where a row is not whole blocks of 64.
    random_base(folder / "base", **sizes, intermediate_size=192, initializer_range=0.25)
    small_tokenizer(folder / "base")
    (folder / "rows.jsonl").touch()
    (folder / "pipeline.toml").write_text(CONFIG)
    for training in TRAININGS:
        layout = Layout(folder / training["run"])
        layout.tokens("train").parent.mkdir(parents=True)
        for part, rows in (("train", TRAIN), ("validation", VALIDATION)):
            with TokenFile(layout.tokens(part)) as file:
                for row in rows:
                    file.add(*(array("i", row[column]).tobytes() for column in ("input_ids", "labels")))
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-m", "support.cuda_code", str(folder)],
        input="".join(json.dumps(training) + "\n" for training in TRAININGS),
        # Processes that are forked may not have threads before.
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return folder


def done(project: Path, run: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((project / run / "done.json").read_text())
    return result


def history(project: Path, run: str) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = json.loads((project / run / "train" / "history.json").read_text())
    return rows


def plain_loss(model: Any, rows: Iterable[dict[str, list[int]]]) -> float:
    """By transformers alone: the mean over all trained tokens of rows that are looked at one by one."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits, labels = model(torch.tensor([row["input_ids"]])).logits[0, :-1], torch.tensor(row["labels"][1:])
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


def plain_base(project: Path, run: str) -> Any:
    """What was trained on, without Unsloth."""
    import torch
    from transformers import BitsAndBytesConfig

    if run != "four-bit":
        return load_float32(project / "base")
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return load_float32(project / "base", quantization_config=packed).dequantize(dtype=torch.float32)


@pytest.mark.parametrize("run", [*SAME, "four-bit"])
def test_rows_are_trained_as_each_alone(project: Path, run: str) -> None:
    base, figures = plain_base(project, run), done(project, run)["figures"]
    assert figures["loss_first"] == pytest.approx(plain_loss(base, TRAIN), rel=1e-6)
    assert figures["validation_loss_first"] == pytest.approx(plain_loss(base, VALIDATION), rel=1e-6)
    # It shows where one row sees another.
    as_one = {name: [number for row in TRAIN for number in row[name]] for name in ("input_ids", "labels")}
    assert figures["loss_first"] != pytest.approx(plain_loss(base, [as_one]), rel=1e-3)


@pytest.mark.parametrize("run", [*SAME, "four-bit"])
def test_the_adapter_is_what_plain_libraries_take_it_for(project: Path, run: str) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(plain_base(project, run), project / run / "train" / "adapter").eval()
    figures = done(project, run)["figures"]
    assert figures["validation_loss_kept"] == pytest.approx(plain_loss(model, VALIDATION), rel=1e-6)
    assert figures["loss_last"] < figures["loss_first"] - 0.01


@pytest.mark.parametrize("run", SAME[1:])
def test_every_step_is_the_same_however_rows_are_put_together(project: Path, run: str) -> None:
    expected = history(project, "joined")
    assert len(expected) == 1 + 2 + 1
    for row, other in zip(history(project, run), expected, strict=True):
        assert row.keys() == other.keys()
        for name in {"loss", "eval_loss", "grad_norm"} & row.keys():
            assert row[name] == pytest.approx(other[name], rel=1e-4), name


@pytest.mark.parametrize("run", ["short", "short-packed"])
def test_resumed_to_the_same_bytes(project: Path, run: str) -> None:
    assert done(project, run)["figures"]["resumed_from"] is None
    assert done(project, f"{run}-resumed")["figures"]["resumed_from"] == "checkpoint-2"
    for name in ("adapter/adapter_model.safetensors", "history.json", "batches.jsonl", "loss.svg"):
        whole, resumed = (sha256_of(project / place / "train" / name) for place in (run, f"{run}-resumed"))
        assert whole == resumed, name


@pytest.mark.parametrize("run", [training["run"] for training in TRAININGS])
def test_it_was_the_cuda_code(project: Path, run: str) -> None:
    result = done(project, run)
    called = result["called"]
    assert {name for name in KERNELS | STEPS if not called.get(name)} == set()
    assert bool(called.get("_sdpa_packed_segments")) == (run != "padded")
    assert bool(called.get("UnslothCheckpointFunction.backward")) == (run == "packed")
    assert bool(called.get("_nf4_dequant_kernel")) == (run == "four-bit")
    assert result["warned"] == []
    assert result["figures"]["device"] == "Stand-in"
    kinds = {"padded": "padded", "packed": "packed", "short-packed": "packed", "short-packed-resumed": "packed"}
    assert result["figures"]["batches"] == kinds.get(run, "end to end")


def batches(project: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (project / run / "train" / "batches.jsonl").read_text().splitlines()]


def test_every_row_is_recorded_as_it_is(project: Path) -> None:
    """Also of a packed sequence; each step of these has all of them."""
    known = sorted((row["input_ids"], row["labels"]) for row in TRAIN)
    for run in SAME:
        for step in range(2):
            found = (zip(b["input_ids"], b["labels"], strict=True) for b in batches(project, run) if b["step"] == step)
            assert sorted(pair for pairs in found for pair in pairs) == known, (run, step)


def test_rows_of_like_lengths_are_padded_together(project: Path) -> None:
    """Also where it is Unsloth that chose to pad."""
    longer, shorter = ([len(ids) for ids in batch["input_ids"]] for batch in batches(project, "padded")[:2])
    assert min(longer) >= max(shorter)

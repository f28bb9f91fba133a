"""Training by the real Unsloth on a small random model: what is trained, resumed, and the same every time."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_models
from support.adapters import merged_by_peft
from support.commands import pipeline

from pipeline.config import Config, Verify
from pipeline.data.token_file import read_tokens
from pipeline.defaults import Facts, resolve
from pipeline.errors import PipelineError, UserError
from pipeline.model import targets, training_fit
from pipeline.model.adapter_file import read_adapter
from pipeline.model.adapter_folder import fit_to, read_given_adapter
from pipeline.model.base import base_folder, resolve_base
from pipeline.model.continued_adapter import read_continued_adapter
from pipeline.model.merging import MergedWeights
from pipeline.model.nf4 import Record
from pipeline.model.shape import shape_of
from pipeline.model.weights_file import read_weights
from pipeline.prompt.tokenizer import saved_tokenizer
from pipeline.resources import sha256_of
from pipeline.run.folder import read_manifest
from pipeline.run.graph import Graph, Node
from pipeline.run.layout import Layout
from pipeline.run.stage import Task
from pipeline.setup import gpu
from pipeline.stages import all_stages
from pipeline.stages.train import (
    COMPLETE,
    STAGE,
    conversations_of,
    last_checkpoint,
    make_trainer,
    schedule,
    warn_of_memory,
    write_record,
)
from pipeline.toml_file import load_config
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import FAIL, PASS
from pipeline.verify.trained_labels import check as check_labels

STEPS = 8
CONFIG = f"""
[model]
base = "base"
[data]
train = "train.jsonl"
validation_fraction = 0.1
[lora]
r = 4
[train]
steps = {STEPS}
batch = 4
accumulation = 1
learning_rate = 3e-2
max_length = 128
eval_interval = 4
save_interval = 2
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random base that has a real tokenizer, data, and a configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("train")
    packaged = resolve_base("smollm2-135m-instruct")
    shape = json.loads((packaged / "config.json").read_text())
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **small, **heads})).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    for path in packaged.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder / "base")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {number}"},
                {"role": "assistant", "content": f"the number is {number}"},
            ]
        }
        for number in range(40)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pipeline.toml").write_text(CONFIG)
    return folder


def train(project: Path, run: str, *more: str) -> None:
    told = pipeline("train", project, "--set", f"run.folder={run}", *more)
    assert told.exit_code == 0, told.output


def with_data_of(trained: Path, run: str) -> None:
    """Make a new run that begins with the data stage of another, which need not be made again."""
    shutil.copytree(trained, trained.parent / run, ignore=shutil.ignore_patterns("train", ".*"))


def train_until(step: int, project: Path, run: str, *more: str) -> None:
    """As `train`, with kill -9 once the checkpoint of a step is on the disk."""
    command = [sys.executable, "-m", "pipeline", "train", project, "--set", f"run.folder={run}", *more]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    checkpoint = Layout(project / run).partial("train") / "scratch" / "checkpoints" / f"checkpoint-{step}" / COMPLETE
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not (project / run / "train").exists()


@pytest.fixture(scope="module")
def trained(project: Path) -> Path:
    train(project, "whole")
    return project / "whole"


def test_the_adapter_learns_in_float32_and_says_what_it_is(trained: Path) -> None:
    from safetensors.torch import load_file

    adapter = trained / "train" / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert len(tensors) == 2 * 2 * 7  # A and B, two layers, seven projections
    history = json.loads((trained / "train" / "history.json").read_text())
    assert history[0]["step"] == 0
    assert "eval_loss" in history[0]
    losses = [row["loss"] for row in history if "loss" in row]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert "validation loss" in (adapter / "README.md").read_text()
    events = [json.loads(line) for line in (trained / "events.jsonl").read_text().splitlines()]
    (tried,) = (place for place, event in enumerate(events) if event["kind"] == "tried")
    lengths = [len(row["input_ids"]) for row in read_tokens(Layout(trained).tokens("validation"))]
    assert events[tried]["rows"] == len(lengths)  # which are fewer than a batch
    assert events[tried]["tokens"] >= max(lengths)
    assert [event["kind"] for event in events[tried:]].count("log") > STEPS  # before the rest of the training
    assert (trained / "train" / "loss.svg").read_text().startswith("<?xml")


def test_what_unsloth_saves_is_taken_as_an_adapter_from_elsewhere(project: Path, trained: Path) -> None:
    fit = fit_to(read_given_adapter(trained / "train" / "adapter"), project / "base")
    assert len(fit.modules) == 2 * 7


def test_what_will_most_likely_not_fit_is_said_before_the_base_is_loaded(
    project: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with a byte less than is counted for the rows that there are, with the mildest remedy."""
    settings = Config.model_validate_json((trained / "config.json").read_text())
    task, model = Task(STAGE, settings, trained, tmp_path), targets.without_weights(project / "base")
    warn_of_memory(model, task, on_gpu=False, validates=True)
    assert task.warnings == []
    longest = max(len(row["input_ids"]) for row in read_tokens(Layout(trained).tokens("train")))
    shape = shape_of(model, settings.lora)
    count = training_fit.needed(settings, shape, longest, on_gpu=False, validates=True).needed
    monkeypatch.setattr("pipeline.setup.machine.free_memory", lambda: count - 1)
    warn_of_memory(model, task, on_gpu=False, validates=True)
    (said,) = task.warnings
    assert re.search(r"of memory are needed, .* are free: if it runs out, set train\.gradient_checkpointing=true", said)


def test_the_batches_are_the_rows_of_the_data_stage(trained: Path) -> None:
    """Every row that was trained on is one of the data stage's, labels and padding included."""
    rows = read_tokens(Layout(trained).tokens("train"))
    known = {(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows}
    batches = [json.loads(line) for line in (trained / "train" / "batches.jsonl").read_text().splitlines()]
    assert [batch["step"] for batch in batches] == list(range(STEPS))
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            length = next(size for size in range(len(ids), 0, -1) if labels[size - 1] != -100)
            row = next(row for row in known if list(row[0][:length]) == ids[:length])
            width = len(row[0])
            assert (tuple(ids[:width]), tuple(labels[:width])) == row
            assert set(labels[width:]) <= {-100}


def test_killed_and_resumed_is_the_same_training(project: Path, trained: Path) -> None:
    """kill -9 in the middle; the same command ends with the same bytes."""
    with_data_of(trained, "killed")
    train_until(4, project, "killed")
    train(project, "killed")
    manifest = json.loads((project / "killed" / "manifest.json").read_text())
    assert manifest["stages"]["train"]["figures"]["resumed_from"] is not None
    for name in ("adapter/adapter_model.safetensors", "history.json", "batches.jsonl", "loss.svg"):
        assert sha256_of(project / "killed" / "train" / name) == sha256_of(trained / "train" / name), name


def test_the_record_of_batches_is_cut_whole(tmp_path: Path) -> None:
    """A kill while it is cut must leave the old record: it is replaced, never written over."""
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-2" / COMPLETE).touch()
    batches, old = tmp_path / "batches.jsonl", tmp_path / "old.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in range(4)]
    batches.write_text("".join(lines) + '{"st')
    old.hardlink_to(batches)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-2"
    assert batches.read_text() == "".join(lines[:2])
    assert old.read_text() == "".join(lines) + '{"st'


def test_packed_rows_are_counted_and_recorded_as_their_conversations(
    project: Path, trained: Path, tmp_path: Path
) -> None:
    """Packed and collated by TRL without Unsloth, which packs on a GPU only."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import pack_dataset

    data_set = Dataset.from_file(str(Layout(trained).tokens("train")))
    rows = data_set.to_list()
    packed = len(pack_dataset(data_set, 128))
    assert packed < len(rows) / 2
    settings = Config.model_validate_json((trained / "config.json").read_text())
    several = {"steps": None, "epochs": 3.0, "batch": 2, "early_stopping": None}
    settings = settings.model_copy(update={"train": settings.train.model_copy(update=several)})
    shutil.copytree(trained / "data", tmp_path / "data")
    (tmp_path / "train").mkdir()
    (tmp_path / "scratch").mkdir()

    task = Task(STAGE, settings, tmp_path, tmp_path / "train", scratch=tmp_path / "scratch")
    model = AutoModelForCausalLM.from_pretrained(project / "base")
    tokenizer = AutoTokenizer.from_pretrained(project / "base")
    trainer = make_trainer(model, tokenizer, data_set, [], resuming=False, packing=True, task=task)
    assert trainer.args.max_steps == 3 * math.ceil(packed / 2)
    assert trainer.args.warmup_steps == math.ceil(trainer.args.max_steps * settings.train.warmup)

    collated = list(trainer.get_train_dataloader())
    assert {len(batch["input_ids"]) for batch in collated} == {1}
    batches = [conversations_of(batch) for batch in collated]
    pairs = itertools.chain.from_iterable(zip(*batch, strict=True) for batch in batches)
    assert sorted(pairs) == sorted((row["input_ids"], row["labels"]) for row in rows)

    adapter = trained / "train" / "adapter"
    artefacts = Artefacts(Verify(), adapter, None, {}, tmp_path, adapter=adapter, run=tmp_path, config=settings)
    record = tmp_path / "train" / "batches.jsonl"
    record.write_text("".join(json.dumps({"step": 0, "input_ids": ids, "labels": of}) + "\n" for ids, of in batches))
    assert {result.verdict for result in check_labels(artefacts)} == {PASS}
    # A packed row that is taken for one conversation is none of the data.
    whole = {key: collated[0][key].tolist() for key in ("input_ids", "labels")}
    record.write_text(json.dumps({"step": 0, **whole}) + "\n")
    assert FAIL in {result.verdict for result in check_labels(artefacts)}


def test_rows_of_like_lengths_stand_together_and_every_validated_token_counts_the_same(
    project: Path, trained: Path, tmp_path: Path
) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = Config.model_validate_json((trained / "config.json").read_text())
    one_epoch = settings.train.model_copy(update={"steps": None, "epochs": 1.0, "batch": 2})
    settings = settings.model_copy(update={"train": one_epoch})
    lengths = [5, 60, 7, 64, 6, 62, 8, 61, 5]
    rows = [{"input_ids": [9, *range(20, 20 + n)], "labels": [-100, *range(20, 20 + n)]} for n in lengths]
    data_set = Dataset.from_list(rows)
    (tmp_path / "train").mkdir()
    (tmp_path / "scratch").mkdir()
    task = Task(STAGE, settings, tmp_path, tmp_path / "train", scratch=tmp_path / "scratch")
    model = AutoModelForCausalLM.from_pretrained(project / "base", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(project / "base")
    tokenizer.pad_token = tokenizer.eos_token = None  # padding needs neither
    trainer = make_trainer(model, tokenizer, data_set, data_set, resuming=False, packing=False, task=task)
    assert tokenizer.pad_token is None
    batches = [conversations_of(batch)[0] for batch in trainer.get_train_dataloader()]
    assert sum(map(len, batches[0])) == max(sum(map(len, batch)) for batch in batches)  # the largest comes first
    if not torch.cuda.is_available():  # where rows are laid end to end, nothing is padded
        assert sum(max(map(len, batch)) - min(map(len, batch)) for batch in batches) < 70
    assert sorted(ids for batch in batches for ids in batch) == sorted(row["input_ids"] for row in rows)

    first = next(iter(trainer.get_eval_dataloader()))
    assert int(first["attention_mask"].sum(-1).max()) == max(lengths) + 1  # the longest first
    total = 0.0
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]], device=model.device)).logits[0, :-1].cpu()
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / sum(lengths), rel=1e-5)


def batch(rows: list[list[int]], labels: list[list[int]], mask: list[list[int]]) -> dict[str, Any]:
    import torch

    return {"input_ids": torch.tensor(rows), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def test_padding_is_left_out_of_the_record_and_never_trained() -> None:
    """By the mask and not by the id: a row may end in the token that it is padded with."""
    rows, mask = [[5, 6, 2, 2], [5, 6, 7, 2]], [[1, 1, 1, 0], [1, 1, 1, 1]]
    labels = [[-100, 6, 2, -100], [-100, 6, 7, -100]]
    assert conversations_of(batch(rows, labels, mask)) == (
        [[5, 6, 2], [5, 6, 7, 2]],
        [[-100, 6, 2], [-100, 6, 7, -100]],
    )
    labels[0][3] = 2
    with pytest.raises(PipelineError, match="padding is trained"):
        conversations_of(batch(rows, labels, mask))
    with pytest.raises(PipelineError, match="does not stand on the right"):
        conversations_of(batch([[2, 5, 6]], [[-100, 5, 6]], [[0, 1, 1]]))


def test_early_stopping_goes_on_counting_after_an_interruption(project: Path, trained: Path) -> None:
    """With steps too small to change anything the loss is never better: three validations after the first, it ends."""
    more = ["early_stopping=3", "eval_interval=1", "learning_rate=1e-30"]
    options = [text for key in more for text in ("--set", f"train.{key}")]
    with_data_of(trained, "stopped")
    train_until(3, project, "stopped", *options)
    train(project, "stopped", *options)
    history = json.loads((project / "stopped" / "train" / "history.json").read_text())
    assert [row["step"] for row in history if "eval_loss" in row] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4]
    figures = json.loads((project / "stopped" / "manifest.json").read_text())["stages"]["train"]["figures"]
    assert figures["resumed_from"] is not None
    assert (figures["steps"], figures["kept_step"]) == (4, 1)
    assert "the adapter of step 1 is kept" in (project / "stopped" / "train" / "adapter" / "README.md").read_text()


def test_training_goes_on_from_an_adapter(project: Path, trained: Path) -> None:
    """It starts at the adapter's loss, not at the base's; another adapter makes it stale."""
    adapter = project / "begun"
    shutil.copytree(trained / "train" / "adapter", adapter)
    options = ("--set", "train.from_adapter=begun", "--set", "train.steps=2", "--set", "train.learning_rate=1e-3")
    with_data_of(trained, "continued")
    train(project, "continued", *options)
    figures = {
        run: json.loads((project / run / "manifest.json").read_text())["stages"]["train"]["figures"]
        for run in ("whole", "continued")
    }
    start, end = (figures["whole"][f"validation_loss_{when}"] for when in ("first", "kept"))
    assert figures["continued"]["validation_loss_first"] == pytest.approx(end, abs=1e-5)
    assert abs(start - end) > 0.1
    assert figures["continued"]["from_adapter"] == str(adapter)
    before, after = (read_weights(folder) for folder in (adapter, project / "continued" / "train" / "adapter"))
    for name in before.shapes:
        change = (after[name] - before[name]).abs().max()
        assert 0 < change < 0.01, name

    config, given = load_config(project / "pipeline.toml", ["run.folder=continued", *options[1::2]])
    settings, _ = resolve(config, given, Facts(1_000_000, 512, None))
    assert Graph(all_stages()).basis(Node("train"), settings, read_manifest(settings.run_folder)).inputs.keys() >= {
        str(adapter / "adapter_config.json"),
        str(adapter / "adapter_model.safetensors"),
    }


def tensorboard_losses(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def wandb_losses(folder: Path) -> list[float]:
    """Of its file: after a header of 7 bytes LevelDB's log format, with records in protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, block = file.read_bytes(), 2**15
    losses, place, data = [], 7, b""
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole of a record, or its end
            items = Record.FromString(data).history.item
            losses += [float(item.value_json) for item in items if "train/loss" in (item.key, *item.nested_key)]
            data = b""
    return losses


def mlflow_losses(folder: Path) -> list[float]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return [metric.value for metric in client.get_metric_history(run.info.run_id, "loss")]


@pytest.mark.parametrize("losses", [tensorboard_losses, wandb_losses, mlflow_losses])
def test_a_tracker_is_told_every_loss(
    project: Path, losses: Callable[[Path], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = losses.__name__.removesuffix("_losses")
    if find_spec(tracker) is None:
        pytest.skip(f"train.report_to: the package {tracker} is not installed: it was not tried")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = project / tracker
    train(project, tracker, "--set", f"train.report_to={tracker}", "--set", "train.steps=2")
    history = json.loads((run / "train" / "history.json").read_text())
    expected = [row["loss"] for row in history if "loss" in row]
    assert len(expected) == 2
    assert losses(Layout(run).tracker) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.r=8", r"begun: was trained with lora.r = 4, not 8: set lora.r so"),
        ("lora.alpha=1", r"was trained with lora.alpha = 4(\.0)?, not 1.0: set"),
        ("lora.dora=true", "lora.dora = false, not true"),
        ('lora.target_modules="attention"', r"mlp.down_proj is changed by it, and not by lora.target_modules"),
        ('lora.save_modules=["embed_tokens"]', "lora.save_modules asks for more than this adapter has"),
    ],
)
def test_an_adapter_that_training_cannot_go_on_from(project: Path, trained: Path, override: str, said: str) -> None:
    shutil.copytree(trained / "train" / "adapter", project / "begun", dirs_exist_ok=True)
    config, given = load_config(project / "pipeline.toml", ["train.from_adapter=begun", override])
    settings, _ = resolve(config, given, Facts(1_000_000, 512, None))
    with pytest.raises(UserError, match=said):
        read_continued_adapter(settings)


@pytest.mark.skipif(gpu.memory() is None, reason="no GPU: CUDA training, packing and GPU memory were not tested")
def test_the_same_command_on_a_gpu(project: Path, trained: Path) -> None:
    """Twice the same bytes; packed, all rows are trained on and none sees another."""
    train(project, "again")
    whole, again, packed = ((project / name / "train") for name in ("whole", "again", "packed"))
    adapter = "adapter/adapter_model.safetensors"
    assert sha256_of(again / adapter) == sha256_of(whole / adapter)

    train(project, "packed", "--set", "train.packing=true")
    figures = json.loads((project / "packed" / "manifest.json").read_text())["stages"]["train"]["figures"]
    assert figures["device"] != "cpu"
    assert figures["cuda"]
    assert figures["peak_gpu_bytes"] > 0
    assert figures["batches"] == "packed"
    assert figures["loss_last"] < figures["loss_first"]
    batches = [json.loads(line)["input_ids"] for line in (packed / "batches.jsonl").read_text().splitlines()]
    rows = [row["input_ids"] for row in read_tokens(project / "packed" / "data" / "train.tokens.arrow")]
    assert max(map(len, batches)) > 4  # of the configuration's batch: several rows in a sequence
    assert all(row in rows for batch in batches for row in batch)


def config(**train: object) -> Config:
    values = {"batch": 8, "accumulation": 1, "epochs": 1.0} | train
    return Config.model_validate({"model": {"base": "x"}, "data": {"train": "x"}, "train": values})


@pytest.mark.parametrize(
    ("rows", "validation", "settings", "expected"),
    [
        (1520, 200, {}, (190, 95, 19)),  # the example: ten validations would cost half as much as the training
        (1520, 20, {}, (190, 19, 19)),
        (1521, 20, {"epochs": 2.0}, (382, 39, 39)),  # a checkpoint for every validation
        (1521, 20, {"epochs": 2.0, "keep": "last"}, (382, 39, 38)),
        (1521, 20, {"eval_interval": 40, "save_interval": 15}, (191, 40, 20)),
        (3, 0, {}, (1, 1, 1)),
        (100, 10, {"steps": 7, "epochs": None, "eval_interval": 3, "save_interval": 2}, (7, 3, 3)),
        (100, 10, {"eval_interval": 3, "save_interval": 7}, (13, 3, 3)),
        (1000, 10, {"accumulation": 4}, (32, 4, 4)),
    ],
)
def test_schedule(rows: int, validation: int, settings: dict[str, object], expected: tuple[int, int, int]) -> None:
    assert schedule(rows, validation, config(**settings)) == expected


@pytest.mark.parametrize("packed", [True, False])
def test_a_base_that_stays_in_16_bits_is_said(packed: bool, tmp_path: Path) -> None:
    """Unsloth leaves some architectures whole, whatever it is asked."""
    from bitsandbytes.nn import Linear4bit

    model = torch.nn.Sequential(Linear4bit(64, 64) if packed else torch.nn.Linear(64, 64))
    task = small_models.make_task(tmp_path, "train", train={"load_in_4bit": True})
    assert write_record(model, task) == packed
    assert Record.read(task.output).in_4bit == ({"0"} if packed else set())
    assert [words.partition(":")[0] for words in task.warnings] == ([] if packed else ["train.load_in_4bit"])
    task = small_models.make_task(tmp_path, "train", train={"load_in_4bit": False})
    assert not write_record(torch.nn.Sequential(torch.nn.Linear(64, 64)), task)
    assert not task.warnings


def test_added_tokens_and_whole_matrices_are_trained_and_merged(project: Path) -> None:
    """The rows of a new token alone, or a tied pair whole and as one: what is trained is what is merged."""
    token = ("--set", 'model.add_tokens=["<mood>"]')
    pair = ("--set", 'lora.save_modules=["embed_tokens", "lm_head"]')
    for run, more in (("tokens", token), ("pair", pair)):
        train(project, run, "--set", "train.steps=2", *more)
        config = Config.model_validate_json((project / run / "config.json").read_text())
        adapter = read_adapter(project / run / "train" / "adapter")
        base = read_weights(base_folder(config.model))
        merged = MergedWeights(base, adapter)
        before, after = base["model.embed_tokens.weight"].float(), merged["model.embed_tokens.weight"]
        changed = (before != after).any(1).nonzero().flatten().tolist()
        if run == "tokens":
            tokenizer = saved_tokenizer(adapter.folder)
            assert changed == tokenizer.convert_tokens_to_ids(["<mood>"]) == [len(tokenizer) - 1]
        else:
            assert len(changed) > 1000
        trained = sum(math.prod(shape) for name, shape in adapter.weights.shapes.items() if "lm_head" not in name)
        manifest = json.loads((project / run / "manifest.json").read_text())["stages"]
        assert manifest["train"]["figures"]["trained_parameters"] == trained
        assert manifest["data"]["figures"]["adapter_parameters"] == trained
        expected = merged_by_peft(base.folder, adapter.folder)
        for name in merged.names:
            assert torch.equal(merged[name], expected[name].detach()), name
        if run == "tokens":
            shutil.rmtree(base.folder)  # it lies in the cache


def test_half_of_a_tied_pair_is_refused_before_training(project: Path) -> None:
    told = pipeline("train", project, "--set", "run.folder=half", "--set", 'lora.save_modules=["lm_head"]')
    assert told.exit_code == 2
    assert 'lora.save_modules = ["lm_head"]: the base\'s head is its embedding (tied)' in told.stderr
    assert not (project / "half" / "train").exists()

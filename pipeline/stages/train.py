"""train: Unsloth 4-bit LoRA training with TRL's SFTTrainer.

The rows arrive as token ids and labels from the data stage and go to the trainer untouched, so what was checked there
is what is trained; every batch that the trainer really used is written down for `verify`.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.console import progress
from pipeline.data.row_order import RowOrder
from pipeline.data.token_file import token_count
from pipeline.errors import PipelineError, UserError
from pipeline.figures import size
from pipeline.model.adapter_folder import WEIGHTS
from pipeline.model.continued_adapter import continued_files, read_continued_adapter
from pipeline.model.facts import base_files
from pipeline.prompt.labels import IGNORED
from pipeline.run.folder import write_whole
from pipeline.run.stage import Stage, Task
from pipeline.setup import gpu, machine

# A checkpoint that was being written when the process was killed has no such file, and is not resumed from.
COMPLETE = "complete"


def main(task: Task) -> dict[str, Any]:
    """Train, or go on with an interrupted training; leave the adapter, the losses and the batches."""
    _prepare_environment(task)
    import unsloth  # noqa: F401, I001  (first: it patches what is imported after it)
    import torch
    from transformers import set_seed
    from unsloth import FastLanguageModel

    from pipeline.model import targets
    from pipeline.model.added_tokens import rows_of
    from pipeline.model.base import base_folder
    from pipeline.prompt.tokenizer import load_tokenizer

    config, settings = task.config, task.config.train
    folder = base_folder(config.model)
    if settings.from_adapter is not None:
        _, said = read_continued_adapter(config)
        for words in said:
            task.warn(words)
    train_rows = _read_rows(task.layout.tokens("train"))
    validation_rows = _read_rows(task.layout.tokens("validation"))
    if settings.early_stopping and not validation_rows:
        raise UserError("train.early_stopping needs validation data: give data.validation or data.validation_fraction")

    cuda = torch.cuda.is_available()
    bare = targets.without_weights(folder, trust_remote_code=config.model.trust_remote_code)
    warn_of_memory(bare, task, on_gpu=cuda, validates=bool(validation_rows))
    tokenizer, _ = load_tokenizer(
        folder, trust_remote_code=config.model.trust_remote_code, chat_template=config.model.chat_template
    )
    assert settings.max_length is not None
    if settings.gradient_checkpointing and not cuda:
        _free_at_once()
    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=settings.max_length,
        load_in_4bit=settings.load_in_4bit,
        dtype=None,  # Unsloth knows what the device computes fast
        trust_remote_code=config.model.trust_remote_code,
        use_gradient_checkpointing="unsloth" if settings.gradient_checkpointing else False,
        random_state=settings.seed,
        use_exact_model_name=True,
    )
    set_seed(settings.seed)
    in_4bit = write_record(model, task)
    chosen = targets.find(model, config.lora)
    merged = targets.find(bare, config.lora)
    if other := chosen.modules.keys() ^ merged.modules.keys():
        raise UserError(
            f"model.base: Unsloth and transformers name the modules of this base differently (e.g. {min(other)}), so "
            "that an adapter trained here could not be merged: give the text model alone as the base"
        )
    model = FastLanguageModel.get_peft_model(
        model,
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        bias=config.lora.bias,
        target_modules=chosen.peft,
        use_rslora=config.lora.rslora,
        use_dora=config.lora.dora,
        use_gradient_checkpointing="unsloth" if settings.gradient_checkpointing else False,
        random_state=settings.seed,
        max_seq_length=settings.max_length,
        **chosen.peft_arguments(rows_of(tokenizer, config.model)),
    )
    trained, total = _count_parameters(model)

    checkpoint = last_checkpoint(task.scratch)
    _prepare_tracker(task, new=checkpoint is None)
    if settings.packing and not cuda:
        task.warn("train.packing: Unsloth packs on a GPU only; here every row is a sequence of its own")
    packing = settings.packing and cuda
    trainer = make_trainer(model, tokenizer, train_rows, validation_rows, checkpoint is not None, packing, task)
    if packing and not trainer.args.packing:
        task.warn("train.packing: Unsloth cannot pack this model; every row is a sequence of its own")
    # TRL rounds the adapter on a 4-bit base to bfloat16; small updates would be lost in it, and so in a checkpoint.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if settings.from_adapter is not None and checkpoint is None:
        _take_over(trainer.model, settings.from_adapter)
    if checkpoint:
        task.event("resume", checkpoint=checkpoint.name)
    with progress("training", trainer.args.max_steps, "steps") as update:
        trainer.add_callback(_reporter(update, task))
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    history = _history(trainer.state.log_history)
    losses = [row["loss"] for row in history if "loss" in row]
    if not losses or not all(math.isfinite(loss) for loss in losses):
        raise PipelineError("the training loss is not finite; try a smaller train.learning_rate")
    if max(losses) == 0:
        raise PipelineError("the training loss is 0 from the start: no token is trained; look at data/data.json")
    validation = {int(row["step"]): row["eval_loss"] for row in history if "eval_loss" in row}
    kept = int((trainer.state.best_model_checkpoint or f"-{trainer.state.global_step}").rpartition("-")[2])
    _save(trainer.model, tokenizer, chosen.names, history, kept, task)
    seconds = result.metrics["train_runtime"]
    tokens = token_count(task.layout.tokens("train")) * trainer.state.global_step / max(1, _epoch(trainer))
    return {
        "steps": trainer.state.global_step,
        "kept_step": kept,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        **({"validation_loss_first": validation[0], "validation_loss_kept": validation[kept]} if validation else {}),
        "trained_parameters": trained,
        "parameters": total,
        "seconds_per_step": seconds / max(1, trainer.state.global_step),
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "load_in_4bit": in_4bit,
        "batches": "packed" if trainer.args.packing else "end to end" if trainer.args.padding_free else "padded",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        **({"cuda": torch.version.cuda, "peak_gpu_bytes": torch.cuda.max_memory_allocated()} if cuda else {}),
        "resumed_from": checkpoint.name if checkpoint else None,
        "seed": settings.seed,
        **({"from_adapter": str(settings.from_adapter)} if settings.from_adapter is not None else {}),
    }


def warn_of_memory(model: Any, task: Task, *, on_gpu: bool, validates: bool) -> None:
    """Say before the base is loaded that the training most likely does not fit; its first batch will tell for certain.

    Args:
        model: the base's, without weights.
        task: the stage's.
        on_gpu: it is trained on a GPU.
        validates: there is validation data.
    """
    from pipeline.model.shape import shape_of
    from pipeline.model.training_fit import nearest, needed

    config, how = task.config, {"on_gpu": on_gpu, "validates": validates}
    assert config.train.max_length is not None
    lengths = lengths_of(_read_rows(task.layout.tokens("train")))
    longest = config.train.max_length if config.train.packing and on_gpu else int(lengths.max(initial=1))
    shape = shape_of(model, config.lora, len(config.model.add_tokens))
    count, there = needed(config, shape, longest, **how).needed, (gpu if on_gpu else machine).free_memory()
    if count > there:
        remedy = nearest(config, shape, longest, there, **how) or "take a smaller base or a larger machine"
        kind = "GPU memory" if on_gpu else "memory"
        task.warn(f"about {size(count)} of {kind} are needed, {size(there)} are free: if it runs out, {remedy}")


def write_record(model: Any, task: Task) -> bool:
    """Leave how Unsloth has the base's modules; whether any is in 4 bits."""
    from pipeline.model.nf4 import Record

    record = Record.of(model)
    record.write(task.output)
    if task.config.train.load_in_4bit and not record.in_4bit:
        task.warn(
            "train.load_in_4bit: Unsloth loaded nothing of this base in 4 bits on this device: it is trained in 16 "
            "bits, which takes the memory of 16, and merged so"
        )
    return bool(record.in_4bit)


def _take_over(model: Any, adapter: Path) -> None:
    """Give a new adapter the numbers of one that is made alike."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    tensors = load_file(adapter / WEIGHTS)
    result = set_peft_model_state_dict(model, tensors)
    missing = [name for name in result.missing_keys if ".lora_" in name]
    if missing or result.unexpected_keys:
        raise PipelineError(
            f"train.from_adapter: {adapter}: {(missing + result.unexpected_keys)[0]}: Unsloth's model names the "
            "adapter's tensors otherwise"
        )


def _prepare_environment(task: Task) -> None:
    """Keep what Unsloth writes inside the run's folder, and what it would fetch at home."""
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(task.scratch / "unsloth_compiled_cache")
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.chdir(task.scratch)


def _free_at_once() -> None:
    """Have glibc give back every freed block of a MiB and more: the holes in its heap are what checkpointing frees.

    That takes some time, as checkpointing does. Another C library has no such call.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD of malloc.h


def _prepare_tracker(task: Task, *, new: bool) -> None:
    """Have an experiment tracker write beside the run's logs, where nothing is deleted, unless it was told where."""
    folder = task.layout.tracker
    if new:  # this training replaces the last one
        shutil.rmtree(folder, ignore_errors=True)
    if task.config.train.report_to != "none":
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder))
        os.environ.setdefault("WANDB_DIR", str(folder))
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")


def _read_rows(path: Path) -> Any:
    """The sequences of a file, mapped into memory: a data set of {"input_ids", "labels"}."""
    from datasets import Dataset, disable_caching

    disable_caching()  # what packing makes of the rows would be kept beside them, in the data stage's folder
    return Dataset.from_file(str(path))


def lengths_of(rows: Any) -> Any:
    """The number of tokens of every row of a data set, as an array."""
    import numpy as np
    from pyarrow import compute

    return np.asarray(compute.list_value_length(rows.data.column("input_ids")))


def _count_parameters(model: Any) -> tuple[int, int]:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, model.get_nb_trainable_parameters()[1]


# What is done where no interval is given; `pipeline.defaults.RULES` says it in words.
VALIDATIONS, VALIDATION_SHARE = 10, 1 / 8


def schedule(rows: int, validation_rows: int, config: Config) -> tuple[int, int, int]:
    """Optimizer steps in all, between validations, between checkpoints.

    `rows` are what the trainer counts: with packing, sequences of several conversations.

    Unless it is given, there are so many VALIDATIONS, or fewer where they would cost more than VALIDATION_SHARE of the
    training: a row that is only looked at costs a third of one that is trained on.
    """
    settings = config.train
    assert settings.batch is not None
    assert settings.accumulation is not None
    rows_a_step = settings.batch * settings.accumulation
    steps = settings.steps or max(1, round(math.ceil(rows / rows_a_step) * float(settings.epochs or 1)))
    affordable = int(steps * rows_a_step * VALIDATION_SHARE / max(1, validation_rows / 3))
    evaluate = settings.eval_interval or math.ceil(steps / max(2, min(VALIDATIONS, affordable)))
    save = settings.save_interval or max(1, steps // VALIDATIONS)
    if validation_rows and settings.keep == "best":  # which can only be kept where it was saved: at every validation
        save = next(interval for interval in range(min(save, evaluate), evaluate + 1) if evaluate % interval == 0)
    return steps, evaluate, save


def make_trainer(
    model: Any,
    tokenizer: Any,
    train_rows: Any,
    validation_rows: Any,
    resuming: bool,
    packing: bool,
    task: Task,
) -> Any:
    """TRL's trainer for rows as the data stage left them, which writes down every batch that it uses.

    Args:
        model: a PEFT model of Unsloth's.
        tokenizer: the trained one.
        train_rows, validation_rows: data sets of {"input_ids", "labels"}.
        resuming: a checkpoint follows, so that no validation is due before the first step.
        packing: put several rows into one sequence.
        task: the stage's task.
    """
    import torch
    from transformers import EarlyStoppingCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from pipeline.model.load import compute_type

    settings = task.config.train
    cuda = torch.cuda.is_available()
    bfloat16 = cuda and compute_type("cuda") is torch.bfloat16
    trainers = copy.deepcopy(tokenizer)  # with a pad token, which the trainer asks for and which is not to be saved
    trainers.pad_token = tokenizer.convert_ids_to_tokens(_padding(model, tokenizer))
    keep_best = bool(validation_rows) and settings.keep == "best"
    arguments = SFTConfig(
        output_dir=str(task.scratch / "checkpoints"),
        # Unsloth weighs by it whether padding pays; the steps of packed rows are known when they are packed.
        max_steps=schedule(len(train_rows), len(validation_rows), task.config)[0],
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=bool(settings.gradient_checkpointing),  # TRL's default is on
        optim=settings.optimizer,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=bfloat16,
        fp16=cuda and not bfloat16,
        use_cpu=not cuda,
        logging_steps=1,
        eval_strategy="steps" if validation_rows else "no",
        eval_steps=1,  # how many there are is known when the trainer has packed the rows
        eval_on_start=bool(validation_rows) and not resuming,
        save_strategy="steps",
        save_total_limit=2,
        load_best_model_at_end=keep_best,
        metric_for_best_model="eval_loss" if keep_best else None,
        greater_is_better=False if keep_best else None,
        restore_callback_states_from_checkpoint=True,  # else a resumed training forgets how long it got no better
        max_length=settings.max_length,
        packing=packing,
        eval_packing=False,
        padding_free=None if cuda else False,  # Unsloth decides whether it can
        dataset_kwargs={"skip_prepare_dataset": not (cuda or packing)},  # where Unsloth may join rows, it prepares them
        remove_unused_columns=False,
        report_to=settings.report_to,
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
    )

    class MarkComplete(TrainerCallback):
        """Mark a checkpoint once all of it is on the disk.

        Not the last one: transformers would train another step from it.
        """

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir() and not control.should_training_stop:
                (folder / COMPLETE).touch()

    class TryValidation(TrainerCallback):
        """After the first step, which was the largest, try the largest validation batch too.

        Only now is everything in the memory that training keeps there: what does not fit, or does not compile, is known
        before the first epoch. `preflight` has no rows yet, and would load the base a second time to learn the same.
        """

        tried = not validation_rows

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if not self.tried:
                self.tried = True
                trainer.try_validation(model)

    batches = task.scratch / "batches.jsonl"

    class RecordingTrainer(SFTTrainer):
        """SFTTrainer that writes down every batch it trains on, and weights the validation loss by tokens."""

        validated: list[tuple[float, int]]  # the summed loss and the trained tokens of each validation batch

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if self.args.packing:  # into sequences of one length
                return super()._get_train_sampler(train_dataset)
            lengths = lengths_of(self.train_dataset)
            return RowOrder(lengths, self.args.train_batch_size, settings.seed, padded=not self.args.padding_free)

        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            # The least padding, and the largest batch first.
            return lengths_of(eval_dataset).argsort(kind="stable")[::-1].tolist()

        def try_validation(self, model: Any) -> None:
            """Take the loss of the largest validation batch, and leave no trace of it."""
            rows = self._get_eval_sampler(self.eval_dataset)[: self.args.eval_batch_size]
            # Not from a loader, which would draw a random number: training is to go on as without this.
            inputs = self.data_collator([self.eval_dataset[row] for row in rows])
            task.event("tried", rows=len(rows), tokens=inputs["input_ids"].numel())
            self.validated = []
            model.eval()
            self.prediction_step(model, inputs)
            model.train()

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            ids, labels = conversations_of(inputs)
            record = {"step": self.state.global_step, "input_ids": ids, "labels": labels}
            with batches.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, separators=(",", ":")) + "\n")
            return super().training_step(model, inputs, *args, **kwargs)

        def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            # The loss alone: TRL's own step also takes the entropy over the whole vocabulary of every token, which
            # costs more than the forward pass.
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = model(**self._prepare_inputs(inputs)).loss.detach().float().mean()
            tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
            self.validated.append((float(loss) * tokens, tokens))
            return loss, None, None

        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            # The trainer's own mean is over batches: a row of five tokens would count as much as one of a thousand.
            self.validated = []
            output = super().evaluation_loop(*args, **kwargs)
            loss, tokens = map(math.fsum, zip(*self.validated, strict=True))
            output.metrics["eval_loss"] = loss / max(1, tokens)
            return output

    trainer = RecordingTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=validation_rows if len(validation_rows) else None,
        processing_class=trainers,
        callbacks=[
            MarkComplete(),
            TryValidation(),
            *([EarlyStoppingCallback(settings.early_stopping)] if settings.early_stopping else []),
        ],
    )
    steps, evaluate, save = schedule(len(trainer.train_dataset), len(validation_rows), task.config)
    trainer.args.max_steps, trainer.args.eval_steps, trainer.args.save_steps = steps, evaluate, save
    trainer.args.warmup_steps = math.ceil(steps * settings.warmup)
    # No gradients: there is room for more rows; but without a GPU the logits of all tokens are there at once. The
    # libraries have a number of their own.
    trainer.args.per_device_eval_batch_size = (4 if cuda else 1) * (settings.batch or 1)
    return trainer


def _padding(model: Any, tokenizer: Any) -> int:
    """The id that fills up rows: nothing looks at it, so any will do that the model has an embedding of."""
    own = tokenizer.pad_token_id
    return own if own is not None and own < model.get_input_embeddings().weight.shape[0] else 0


def conversations_of(batch: Any) -> tuple[list[list[int]], list[list[int]]]:
    """The token ids and the labels of a batch, a list for each conversation, without padding.

    In a packed batch, which has one long row, a conversation begins where positions start anew.

    Raises:
        PipelineError: padding would be trained, or does not stand on the right.
    """
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    if "position_ids" in batch:
        (positions,), (ids,), (labels,) = batch["position_ids"].tolist(), ids, labels
        starts = [place for place, position in enumerate(positions) if position == 0]
        cut = [slice(start, end) for start, end in itertools.pairwise([*starts, len(positions)])]
        return [ids[part] for part in cut], [labels[part] for part in cut]
    lengths = batch["attention_mask"].sum(-1).tolist()
    for row, length, mask in zip(labels, lengths, batch["attention_mask"].tolist(), strict=True):
        if not all(mask[:length]) or any(label != IGNORED for label in row[length:]):
            raise PipelineError("the trainer's padding is trained, or does not stand on the right")
    return [row[:end] for row, end in zip(ids, lengths, strict=True)], [
        row[:end] for row, end in zip(labels, lengths, strict=True)
    ]


def _reporter(update: Any, task: Task) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        """Show steps on the bar and keep every logged figure in events.jsonl."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            update(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            task.event("log", step=state.global_step, **(logs or {}))

    return Reporter()


def last_checkpoint(scratch: Path) -> Path | None:
    """The newest whole checkpoint, with the record of batches cut back to it. Broken ones are removed."""
    found: list[tuple[int, Path]] = []
    for folder in (scratch / "checkpoints").glob("checkpoint-*"):
        if (folder / COMPLETE).is_file():
            found.append((int(folder.name.rpartition("-")[2]), folder))
        else:
            shutil.rmtree(folder)
    step, folder = max(found, default=(0, Path()))
    batches = scratch / "batches.jsonl"
    if batches.is_file():
        kept = [line for line in _whole_lines(batches) if json.loads(line)["step"] < step]
        write_whole(batches, "".join(kept))
    return folder if found else None


def _whole_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from (line for line in file if line.endswith("\n"))


def _history(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The losses by step, without times: the same training has the same history."""
    kept = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
    rows = ({key: row[key] for key in kept if key in row} for row in log)
    return [row for row in rows if "loss" in row or "eval_loss" in row]


def _epoch(trainer: Any) -> float:
    """Steps of one pass over the data."""
    return float(trainer.state.global_step / trainer.state.epoch) if trainer.state.epoch else 1.0


def _save(
    model: Any, tokenizer: Any, modules: list[str], history: list[dict[str, float]], kept: int, task: Task
) -> None:
    from pipeline.model.card import write_model_card
    from pipeline.plots import loss_curve

    adapter = task.new(task.layout.adapter)
    for configuration in model.peft_config.values():
        configuration.base_model_name_or_path = task.config.model.base
        configuration.revision = task.config.model.revision
    # Embeddings are not trained; without this PEFT asks the hub whether they were.
    model.save_pretrained(adapter, save_embedding_layers=False)
    tokenizer.save_pretrained(adapter)
    write_model_card(adapter / "README.md", task.config, modules, history, kept)
    shutil.copy(task.scratch / "batches.jsonl", task.new(task.layout.batches))
    task.new(task.layout.history).write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    loss_curve(history, task.new(task.layout.loss_curve))


STAGE = Stage(
    name="train",
    summary="Train the LoRA adapter with Unsloth and TRL's SFTTrainer.",
    run=main,
    needs=("data",),
    reads={"data": ("train.tokens.arrow", "validation.tokens.arrow")},
    settings=("model", "lora", "train"),
    # A tracker looks on; the interval says how much of an interrupted training is lost.
    indifferent_to=("train.report_to", "train.save_interval", "train.from_adapter"),  # the last by its content
    files=lambda config, _: [*base_files(config.model), *continued_files(config)],
    libraries=(
        *("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate"),
        *("datasets", "tokenizers", "safetensors"),
    ),
    goes_on=True,
    imports_first=True,  # Unsloth patches the others while they are imported
    figures=(
        *("steps", "kept_step", "loss_last", "validation_loss_first", "validation_loss_kept", "tokens_per_second"),
        "device",
    ),
    judged=True,
    smaller="set a smaller train.batch or train.max_length; `pipeline plan` counts what fits",
)

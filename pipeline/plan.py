"""`pipeline plan`: what a run will need of memory, disk and time, before anything is downloaded or trained.

The base's config.json is enough. Memory and disk are counted in `pipeline.model`, for preflight, the defaults and the
train stage too, but that preflight asks only for the least that training needs.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli import configured, each
from pipeline.model import training_fit
from pipeline.processes import cores

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.model.shape import Shape
    from pipeline.model.training_memory import TrainingMemory

# Seconds of one core for a billion weights, from single runs at 1.3 billion on two cores; cores share the work.
_CORE_SECONDS = {"merge": 18.0, "convert": 46.0, "quantize": 48.0}
# Assumed, not measured: what LoRA training reaches of a card's products, and what a core does each second in float32.
_EFFICIENCY, _CORE_FLOPS = 0.35, 60e9
# About how many dense 16-bit products a card does each second, by a word of the name that nvidia-smi tells.
_CARD_FLOPS = {
    **{"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12},
    **{"A10G": 70e12, "A10": 125e12, "A40": 150e12, "T4": 65e12, "V100": 125e12, "4090": 165e12, "3090": 71e12},
}


class Size(click.ParamType):
    """A number of bytes: "24GB", "512 MB". Memory comes in powers of 1024, disks in powers of 1000."""

    name = "SIZE"

    def __init__(self, kilo: int) -> None:
        self.kilo = kilo

    def convert(self, value: Any, param: Any, context: Any) -> int:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT])i?B?\s*", str(value), re.IGNORECASE)
        if found is None:
            self.fail(f"{value!r} is no size: write it as 24GB", param, context)
        return int(float(found[1]) * self.kilo ** ("MGT".index(found[2].upper()) + 2))


@dataclass(frozen=True)
class Machine:
    """What there is: bytes of GPU memory (None: no GPU), of memory, of free disk; the card's name, and cores."""

    gpu: int | None
    memory: int
    disk: int
    card: str
    cores: int


@dataclass(frozen=True)
class Row:
    """What a stage needs, in bytes and seconds; None for what is not known."""

    stage: str
    gpu: int | None
    memory: int | None
    disk: int
    seconds: float | None


@click.command("plan", epilog="Example: pipeline plan my/pipeline.toml --gpu 24GB --memory 32GB")
@configured
@click.option("--gpu", type=Size(1024), help="For a machine with a GPU of this size; 0GB: without one.")
@click.option("--memory", type=Size(1024), help="For a machine with so much memory.")
@click.option("--disk", type=Size(1000), help="For a machine with so much free disk.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    config: Path,
    overrides: tuple[str, ...],
    training: str,
    gpu: int | None,
    memory: int | None,
    disk: int | None,
    as_json: bool,
) -> None:
    """Show what every stage will need of memory, disk and time, and whether it fits.

    Nothing is downloaded but the base's config.json. Without options this machine is meant. Exit status 1 where
    something does not fit; the nearest settings that do are named.
    """
    failed = False
    for settings, _ in each(config, overrides, training, gpu_memory=gpu, one=as_json):
        failed |= _plan(settings, _machine(settings, gpu, memory, disk), as_json)
    sys.exit(failed)


def _plan(settings: Config, machine: Machine, as_json: bool) -> bool:
    """Show it; whether something does not fit."""
    shape, rows, longest = count(settings, machine)
    wrong = list(problems(settings, shape, machine, rows, longest))
    if as_json:
        document = {
            "base": settings.model.base,
            "shape": {"parameters": shape.parameters, **asdict(shape)},
            "machine": asdict(machine),
            "stages": [asdict(row) for row in rows],
            "training": asdict(_training(settings, shape, machine, longest)),
            "problems": wrong,
        }
        click.echo(json.dumps(document, indent=1))
    else:
        _show(settings, shape, machine, rows, wrong, longest)
    return bool(wrong)


def _machine(settings: Config, gpu: int | None, memory: int | None, disk: int | None) -> Machine:
    from pipeline.setup import gpu as cards
    from pipeline.setup.machine import existing, memory_bytes

    named = cards.gpus().cards
    there = cards.memory() if gpu is None else gpu or None
    return Machine(
        there,
        memory or memory_bytes(),
        disk or shutil.disk_usage(existing(settings.run_folder)).free,
        named[0].name if named and gpu is None else "",
        cores(),
    )


def count(settings: Config, machine: Machine) -> tuple[Shape, list[Row], int]:
    """The base's sizes, what each stage needs, and the longest row in tokens that this was counted with.

    Raises:
        UserError: there is no such base, or it cannot be trained so.
    """
    from pipeline.model import memory
    from pipeline.model.base import config_folder
    from pipeline.model.merge_target import chosen_base
    from pipeline.model.shape import shape_of
    from pipeline.model.targets import without_weights
    from pipeline.verify.machine_needs import disk_needs

    folder = config_folder(settings.model.base, settings.model.revision)
    model = without_weights(folder, trust_remote_code=settings.model.trust_remote_code)
    shape = shape_of(model, settings.lora, len(settings.model.add_tokens))
    longest, tokens = _data(settings)
    assert settings.train.batch is not None
    disk = disk_needs(settings, shape.parameters)
    billions = shape.parameters / 1e9
    needed = _training(settings, shape, machine, longest)
    times = {stage: seconds * billions / machine.cores for stage, seconds in _CORE_SECONDS.items()}
    merge = memory.merge(
        {name: tuple(tensor.shape) for name, tensor in model.named_parameters()},
        measures=chosen_base(settings) is None,
    )
    rows = [
        Row(
            "train",
            needed.needed if machine.gpu is not None else None,
            None if machine.gpu is not None else needed.needed,
            disk["checkpoints"],
            _training_seconds(settings, shape, machine, tokens),
        ),
        Row("merge", None, merge, disk["merge"], times["merge"]),
        Row("convert", None, None, disk["convert"], times["convert"]),
        Row("quantize", None, None, disk["quantize"], times["quantize"] * len(settings.export.quant)),
        Row("deploy", None, None, disk["modelfile"] + disk["deploy"], None),
        Row("verify", None, memory.float32_model(shape.parameters), disk["verify"], None),
    ]
    return shape, rows, longest


def _training(settings: Config, shape: Shape, machine: Machine, longest: int) -> TrainingMemory:
    return training_fit.needed(settings, shape, longest, **_how(settings, machine))


def _how(settings: Config, machine: Machine) -> dict[str, bool]:
    validates = settings.data.validation is not None or settings.data.validation_fraction > 0
    return {"on_gpu": machine.gpu is not None, "validates": validates}


def _data(settings: Config) -> tuple[int, int | None]:
    """The longest row, and the tokens of an epoch where the data stage has counted them."""
    from pipeline.run.layout import Layout

    most = settings.train.max_length
    assert most is not None
    summary = Layout(settings.run_folder).data_summary
    if summary.is_file():
        figures = json.loads(summary.read_text(encoding="utf-8"))
        return most if settings.train.packing else min(figures["train_longest"], most), figures["train_tokens"]
    rows = settings.data.train
    if settings.train.packing or rows is None or rows.suffix != ".jsonl" or not rows.is_file():
        return most, None
    with rows.open("rb") as file:  # a token is a byte at least, and JSON's own marks are more than a template's
        return min(most, max(map(len, file), default=most)), None


def _training_seconds(settings: Config, shape: Shape, machine: Machine, tokens: int | None) -> float | None:
    """Two operations a weight and token forward, as many back to the activations, as many again with checkpointing."""
    if machine.gpu is None:
        rate = machine.cores * _CORE_FLOPS
    else:
        rate = _EFFICIENCY * next(
            (flops for word, flops in _CARD_FLOPS.items() if re.search(rf"\b{word}\b", machine.card)), 0
        )
    if not rate or tokens is None or settings.train.epochs is None:
        return None
    passes = 6 if settings.train.gradient_checkpointing else 4
    return passes * shape.parameters * tokens * settings.train.epochs / rate


def problems(settings: Config, shape: Shape, machine: Machine, rows: list[Row], longest: int) -> Iterator[str]:
    """What does not fit, each with what to do."""
    from pipeline.figures import size

    for row in rows:
        for kind, needed, there in (("GPU memory", row.gpu, machine.gpu), ("memory", row.memory, machine.memory)):
            if needed is None or there is None or needed <= there or row.stage == "verify":  # which says what it skips
                continue
            advice = "take a smaller base or a larger machine"
            if row.stage == "train":
                nearest = training_fit.nearest(settings, shape, longest, there, **_how(settings, machine))
                advice = nearest or advice
            yield f"{row.stage}: {size(needed)} of {kind} are needed, {size(there)} are there: {advice}"
    disk = sum(row.disk for row in rows)
    if disk > machine.disk:
        yield f"disk: {size(disk)} are needed, {size(machine.disk)} are there: free some, or choose another run.folder"


def _show(settings: Config, shape: Shape, machine: Machine, rows: list[Row], wrong: list[str], longest: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from pipeline.console import results
    from pipeline.figures import duration, size
    from pipeline.model.training_memory import full_fine_tuning

    console = results()
    names = ", ".join(f"{name} ({times})" for name, times in shape.modules.items())
    share = shape.trained / shape.parameters
    console.print(Text(f"{settings.model.base}: {shape.parameters:,} weights, {shape.layers} layers"))
    console.print(Text(f"adapter: {shape.trained:,} trained values ({share:.2%}), on {names}"))
    table = Table("stage", "GPU memory", "memory", "disk", "time")
    for row in rows:
        table.add_row(
            row.stage,
            *("" if value is None else size(value) for value in (row.gpu, row.memory, row.disk)),
            "" if row.seconds is None else f"about {duration(row.seconds)}",
        )
    gpu = "none" if machine.gpu is None else size(machine.gpu)
    table.add_section()
    table.add_row("there is", gpu, size(machine.memory), size(machine.disk), "")
    console.print(table)
    needed = _training(settings, shape, machine, longest)
    parts = ", ".join(f"{name} {size(value)}" for name, value in asdict(needed).items() if value)
    train = settings.train
    console.print(Text(f"train, with {train.batch} rows of {longest} tokens: {parts}"))
    console.print(Text(f"every weight trained instead: {size(full_fine_tuning(shape))} and the activations"))
    for problem in wrong:
        console.print(Text(f"does not fit: {problem}", style="bold red"))

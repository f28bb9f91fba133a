"""The defaults that depend on the size of the model and on the machine, each with its reason.

What is given in pipeline.toml or with --set always wins; this fills in the rest and says where each value came from.
What was given is held here against what is installed, so that a mistake is not found only after the training.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from pipeline.config import Config, fields
from pipeline.errors import UserError
from pipeline.figures import memory_size
from pipeline.model import training_memory
from pipeline.model.held_out import LEAST_COMPARED, MOST_COMPARED, compared_tokens
from pipeline.prompt.chat_templates import DEFAULT, OF_TEXTS

LONGEST_ROW = 2048  # tokens that a row is held to, and a text cut into
EPOCHS = 3
BATCH = 8  # rows, without a GPU
STEP = 16  # rows of an optimizer step, on a GPU
OPTIMIZER, OPTIMIZER_ON_GPU = "adamw_torch", "adamw_8bit"
SLOW, ASKED = 1e9, 100  # a base of so many parameters or more is asked so many questions only
# What stands in for each key whose default is None: in words, for docs/configuration.md and for `pipeline config`.
# What depends on the base and the machine is worked out by `resolve`; the same page shows that for some of both.
RULES = {
    "model.revision": "the hub's main branch",
    "model.chat_template": f"the base's own; for a base without one {DEFAULT}, whose turns end with EOS; for "
    f'data.format = "text" {OF_TEXTS}, which goes on with a text',
    "adapter.path": "none: one is trained",
    "adapter.density": "none: nothing is left out",
    "adapter.rank": "the largest rank among the adapters",
    "adapters.test": "those of its run, without data.test; else the questions of data.test are asked",
    "data.validation": "the rows that data.validation_fraction splits off",
    "data.test": "none: no rung is asked",
    "data.group": "rows of one question stay together",
    "data.template": "none: rows have one of the known shapes",
    "data.system": "none is added",
    "data.window": "train.max_length",
    "lora.alpha": "equal to lora.r: a scaling of 1",
    "train.from_adapter": "none: a new adapter is trained",
    "train.epochs": f"{EPOCHS}, where train.steps is not given",
    "train.steps": "as many as train.epochs takes",
    "train.batch": f"{BATCH} without a GPU; on one, by the memory that the weights leave",
    "train.accumulation": f"1 without a GPU; on one, what makes a step of {STEP} rows",
    "train.learning_rate": "by the size of the base: the larger, the lower",
    "train.optimizer": f"{OPTIMIZER} without a GPU, {OPTIMIZER_ON_GPU} on one",
    "train.eval_interval": "a tenth of the steps, or more where validating would take over an eighth of the time",
    "train.save_interval": 'a tenth of the steps, or fewer: with train.keep = "best" every validation has one',
    "train.early_stopping": "all steps are trained",
    "train.max_length": f"the smaller of {LONGEST_ROW} and the base's context",
    "train.gradient_checkpointing": "true on a GPU for a base of more than "
    f"{training_memory.CHECKPOINTED / 1e9:g} billion parameters, else false",
    "merge.model": "none: into what the 4 bits unpack to",
    "ollama.name": "the name of the folder of pipeline.toml",
    "ollama.system": "data.system",
    "ollama.host": "OLLAMA_HOST; without it the usual address if an Ollama answers there, else one of the run's own",
    "ollama.license": "none",
    "eval.limit": f"all for a base of less than {SLOW / 1e9:g} billion parameters, else {ASKED}",
    "eval.minutes": "none: every question of eval.limit is asked",
    "verify.tokens": f"{MOST_COMPARED:,} for a base of less than a billion parameters; from there on the fewer the "
    f"larger it is, at least {LEAST_COMPARED}",
    "verify.quantized_divergence": "by the bits of the type",
    "verify.quantization_error": "by the bits of the type",
}


@dataclass(frozen=True)
class Facts:
    """What the defaults depend on.

    Attributes:
        parameters: how many weights the base has; None when that could not be learned.
        context: the longest sequence that the base was made for, in tokens; None when unknown.
        gpu_memory: bytes of the CUDA device; None without one.
        kept: this is the machine of the run's first stage, which need not be the one at hand.
    """

    parameters: int | None
    context: int | None
    gpu_memory: int | None
    kept: bool = False


def resolve(config: Config, given: dict[str, str], facts: Facts) -> tuple[Config, dict[str, str]]:
    """Fill in what was not given.

    Args:
        config: as `load_config` returns it.
        given: where each given key came from, by dotted key.
        facts: the base and the machine.

    Returns:
        The configuration with every value set, and the source of every key.

    Raises:
        UserError: Ollama would not take the name, the address or a parameter, llama-quantize has no such type, or the
            experiment tracker is not installed; or a folder holds no adapter that can be used.
    """
    _check(config, given)
    chosen: dict[str, tuple[Any, str]] = {}

    def choose(key: str, value: Any, reason: str = "") -> None:
        section, name = key.split(".")
        if getattr(getattr(config, section), name) is None:
            chosen[key] = (value, f"default {reason}" if reason else f"default: {RULES[key]}")

    size = facts.parameters
    large = f"for {size / 1e6:,.0f} M parameters" if size else "for a base of unknown size"
    gpu = facts.gpu_memory
    machine = f"for a GPU with {memory_size(gpu)}" if gpu else "for a machine without a GPU"
    if facts.kept:
        machine += ", kept from this run's first stage"

    choose("lora.alpha", float(config.lora.r))
    if config.train.steps is None:
        choose("train.epochs", float(EPOCHS))
    # Small models need, and stand, larger steps (the QLoRA paper, table 9, halves the rate for larger models).
    rate = 1e-3 if size and size < 500e6 else 4e-4 if size and size < 2e9 else 2e-4 if not size or size < 20e9 else 1e-4
    choose("train.learning_rate", rate, large)
    batch = BATCH
    if gpu:
        batch = training_memory.default_batch(gpu, size, in_4bit=config.train.load_in_4bit)
    choose("train.batch", batch, machine)
    accumulation = max(1, STEP // (config.train.batch or batch)) if gpu else 1
    choose("train.accumulation", accumulation, machine)
    choose("train.optimizer", OPTIMIZER_ON_GPU if gpu else OPTIMIZER, machine)
    context = min(LONGEST_ROW, facts.context or LONGEST_ROW)
    choose("train.max_length", context)
    longest = config.train.max_length or context
    choose("data.window", longest)
    if config.data.window is not None and config.data.window > longest:
        raise UserError(
            f"{given.get('data.window', '')}: data.window = {config.data.window:,} is longer than train.max_length = "
            f"{longest:,}: make it shorter, or raise train.max_length"
        )
    if config.data.format == "text" and not config.given_adapters:
        choose("model.chat_template", OF_TEXTS)
    choose("train.gradient_checkpointing", bool(gpu) and training_memory.checkpoints_gradients(size), machine)
    # The GGUF files are asked on the CPU, in llama-server and in Ollama, where a large model takes long to answer.
    choose("eval.limit", None if size and size < SLOW else ASKED, large)
    choose("verify.tokens", compared_tokens(size), large)

    update: dict[str, dict[str, Any]] = {}
    for key, (value, _) in chosen.items():
        section, name = key.split(".")
        update.setdefault(section, {})[name] = value
    resolved = config.model_copy(
        update={section: getattr(config, section).model_copy(update=values) for section, values in update.items()}
    )
    sources = {}
    for key, _ in fields():
        default = f"default: {RULES[key]}" if key in RULES else "default"
        sources[key] = given.get(key) or _given_table(key, given) or chosen.get(key, (None, default))[1]
    return resolved, sources


def _given_table(key: str, given: dict[str, str]) -> str | None:
    """A key whose value is a table is given by the keys in that table."""
    return next((place for name, place in given.items() if name.startswith(f"{key}.")), None)


def _check(config: Config, given: dict[str, str]) -> None:
    from pipeline.llamacpp.programs import installed
    from pipeline.llamacpp.quantizer import quantization_type
    from pipeline.model.adapter_folder import read_given_adapter
    from pipeline.ollama.address import normal_host, without_password
    from pipeline.ollama.parameters import check_parameters
    from pipeline.ollama.target import names_of

    @contextmanager
    def at(key: str) -> Iterator[None]:
        place = given.get(key) or _given_table(key, given)
        try:
            yield
        except UserError as error:
            if place and key == "ollama.host":
                place = without_password(place)
            raise UserError(f"{place}: {error}" if place else str(error)) from None

    from_adapter = config.train.from_adapter
    for key, folder in (
        *(("adapter.path" if config.adapter.path else "adapters", folder) for folder in config.given_adapters),
        *((("train.from_adapter", from_adapter),) if from_adapter else ()),
    ):
        if folder.is_dir():  # what a training of this file makes may be yet to come
            with at(key):
                try:
                    read_given_adapter(folder)
                except UserError as error:
                    raise UserError(f"{key}: {error}") from None
    if installed("llama-quantize"):
        with at("export.quant"):
            for name in config.export.quant:
                quantization_type(name)
    with at("ollama.name"):
        names_of(config.ollama.name, config.export.quant)
    if config.ollama.host:
        with at("ollama.host"):
            normal_host(config.ollama.host)
    for name, value in config.ollama.parameters.items():
        with at(f"ollama.parameters.{name}"):
            check_parameters({name: value})
    tracker = config.train.report_to
    if tracker != "none" and find_spec(tracker) is None:
        raise UserError(
            f'{given.get("train.report_to", "")}: train.report_to = "{tracker}": the package {tracker} is not '
            f"installed here; type `{sys.executable} -m pip install {tracker}`, or remove the key"
        )

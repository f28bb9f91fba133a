"""pipeline.toml: every value that a run depends on, validated once and frozen.

A value that is not given is None here where the right default depends on the model's size, the machine or the data, or
where none is right. `pipeline.defaults` fills in what depends on the model and the machine before any stage runs, and
`pipeline.toml_file` reads the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

# Those of transformers that need no library beyond the locked ones.
Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit",
    "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit",
    "adafactor", "adagrad", "sgd", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
]  # fmt: skip

# TOML has strings for paths and lists for tuples: only for these two a value of another type is taken.
File = Annotated[Path, Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class Section(BaseModel):
    """A table of the file: its values never change, and a key or a type that it does not know is an error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        serialize_by_alias=True,  # a key that is a word of Python has another name here
    )


class Model(Section):
    """What is fine-tuned."""

    base: str = Field(
        description="a packaged model's name, a hub id (owner/name), a local folder, or a GGUF file", min_length=1
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="instead of the base's own: the name of a well-known chat template, or the path of a Jinja file",
    )

    add_tokens: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="tokens that the base is given: its tokenizer and embedding grow, and the new rows are trained"
    )

    @field_validator("add_tokens")
    @classmethod
    def _tokens(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for token in value:
            if not token or re.search(r"\s", token) or value.count(token) > 1:
                why = "is there twice" if value.count(token) > 1 else "a token is some text without white space"
                raise ValueError(f"model.add_tokens: {token!r}: {why}")
        return value


class Source(Section):
    """More rows to train on."""

    path: File = Field(description="a file, a folder or a pattern, as data.train is")
    weight: float = Field(1.0, gt=0, le=100, description="how often each row is trained: 0.5 takes half of them")
    limit: int | None = Field(None, ge=1, description="the first so many rows")
    system: str | None = Field(None, description="system message for its rows that have none, instead of data.system")


class Data(Section):
    """What it is trained on."""

    train: File | None = Field(
        description="conversations to train on: a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow; also .gz, .zst), "
        "a folder of them, a pattern such as parts/*.jsonl, a data set of a hub, "
        "hf:OWNER/NAME:CONFIGURATION:SPLIT@REVISION, or - for standard input; not with adapter.path"
    )
    sources: Annotated[tuple[Source, ...], Field(strict=False)] = Field(
        (),
        description="more to train on, each a table with path and, where wanted, weight (how often a row is trained: "
        "0.5 takes half of them), limit (the first so many rows) and system (for its rows that have none)",
    )
    validation: File | None = Field(None, description="conversations for the validation loss")
    test: File | None = Field(None, description="conversations that `evaluate` and `deploy` ask")
    validation_fraction: float = Field(
        0.05, ge=0, lt=1, description="share of train that is split off when no validation file is given"
    )
    group: str | None = Field(None, min_length=1, description="key of a row whose value keeps rows in one split")
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt", "text"] = Field(
        "auto", description="shape of a row; text: every row is a whole text, which is trained to its end"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description='the rows\' own names of known keys, e.g. { completion = "response" }'
    )
    template: str | None = Field(
        None, min_length=1, description="Jinja expression that makes a list of messages of a row of another shape"
    )
    ignore: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="keys of rows and messages that are left aside; any other unknown key is an error"
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="what is trained of a row: every answer, the last answer, or every token"
    )
    system: str | None = Field(None, description="system message for rows that have none")
    on_error: Literal["stop", "skip"] = Field("stop", description="what to do with a row that cannot be used")
    skip_limit: float = Field(0.1, ge=0, le=1, description="largest share of the rows that on_error = skip leaves out")
    on_overlong: Literal["error", "drop", "truncate", "split"] = Field(
        "error",
        description="what to do with a row that is longer than train.max_length; split cuts between an answer and the "
        "next question",
    )
    window: int | None = Field(
        None, ge=8, description="longest sequence of a whole text, in tokens: a longer text is cut into such windows"
    )
    duplicates: Literal["drop", "near", "keep"] = Field(
        "drop",
        description="drop: a row that repeats another is trained once; near: and of rows that are nearly the same the "
        "first is trained; keep: all are",
    )
    shuffle: bool = Field(
        False,
        description="rows stand in an order that train.seed draws, whatever files they come from; training draws one "
        "for each epoch anyhow",
    )
    control_tokens: Literal["error", "keep", "split"] = Field(
        "error",
        description="what to do with a text that holds a control token of the model; split, into ordinary tokens, is "
        "refused, since no server does so",
    )
    unwritten: Literal["error", "keep"] = Field(
        "error", description="what to do with a row of which the chat template leaves out a part, e.g. its tools"
    )

    @field_validator("control_tokens")
    @classmethod
    def _as_served(cls, value: str) -> str:
        if value == "split":
            raise ValueError(
                'data.control_tokens = "split": a control token in a text would be trained as ordinary tokens, and '
                "Ollama and llama-server read it as the control token, wherever it stands in a prompt, and end an "
                "answer at it: the model would be served what it was not trained on. Take it out of the texts "
                '("error" names them all), or "keep" it as the token that it is'
            )
        return value


class Lora(Section):
    """The adapter."""

    r: int = Field(16, ge=1, le=1024, description="rank")
    alpha: float | None = Field(None, gt=0, description="scaling numerator")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases are trained")
    target_modules: Literal["minimal", "attention", "all"] | Names = Field(
        "all",
        description="which modules get an adapter: minimal (query and value), attention, all (attention and "
        "feed-forward, in every architecture), or a list of names, full names and regular expressions",
    )
    exclude: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="modules that get none, given as a list in target_modules is"
    )
    save_modules: Annotated[tuple[Literal["embed_tokens", "lm_head"], ...], Field(strict=False)] = Field(
        (),
        description="matrices that are trained whole and saved with the adapter: embed_tokens (the embedding) and "
        "lm_head (the head), whatever the base calls them",
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead of alpha / r")
    dora: bool = Field(False, description="weight-decomposed LoRA")

    @field_validator("target_modules")
    @classmethod
    def _no_embeddings(cls, value: Any) -> Any:
        for name in value if isinstance(value, tuple) else ():
            if name.rpartition(".")[2] in ("lm_head", "embed_tokens"):
                raise ValueError(
                    f"lora.target_modules: an adapter on {name} is not trained (Unsloth would train the whole matrix, "
                    "and with tied embeddings a merge would change both): leave it out, or train it whole "
                    "(lora.save_modules)"
                )
        return value


class GivenAdapter(Section):
    """One of the adapters that were trained elsewhere, each on the same base, and are combined into one."""

    path: File = Field(description="its folder, as adapter.path is")
    training: str = Field(
        "",
        description="one of [[trainings]] by its name, in the place of path; both, in a "
        "file without [[trainings]]: the folder may be made later",
    )
    weight: float = Field(1.0, ge=-100, le=100, description="what it counts; below 0 it is taken away")
    name: str = Field("", description="what it is called; without it, as its folder is")
    test: File | None = Field(
        None,
        description="its own test questions, which it is asked alone and the combination too; without it and without "
        "data.test those of the run that trained it, where its folder is a run's",
    )

    @property
    def called(self) -> str:
        """Its name, as a folder's name can be."""
        return re.sub(r"[^\w.-]+", "-", self.name or self.training or self.path.name)


class Adapter(Section):
    """An adapter that was trained elsewhere, or several in one: taken as it is, and nothing is trained."""

    path: File | None = Field(None, description="its folder, as PEFT saves it: adapter_config.json and safetensors")
    combine: Literal[
        "cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune",
        "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
    ] = Field(
        "cat",
        description="how [[adapters]] become one, by PEFT's names: cat is their weighted sum, with the sum of their "
        "ranks; svd the nearest to it with a lower rank; the others mix matrices, and need one rank",
    )  # fmt: skip
    density: float | None = Field(
        None, gt=0, le=1, description="share of the values that ties, dare_... and magnitude_prune keep"
    )
    rank: int | None = Field(None, ge=1, le=1024, description="rank of what svd and ..._svd give")


class Train(Section):
    """How it is trained."""

    from_adapter: File | None = Field(
        None, description="the folder of an adapter that training goes on from; [lora] must be what it was trained with"
    )
    epochs: float | None = Field(None, gt=0, description="passes over the data; excludes steps")
    steps: int | None = Field(None, ge=1, description="optimizer steps; excludes epochs")
    batch: int | None = Field(None, ge=1, description="rows per forward pass")
    accumulation: int | None = Field(None, ge=1, description="forward passes per optimizer step")
    learning_rate: float | None = Field(None, gt=0, description="peak learning rate")
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="learning rate schedule"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    optimizer: Optimizer | None = Field(None, description="an optimizer's name as transformers spells it")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    seed: int = Field(3407, ge=0, le=2**32 - 1, description="seed of the adapter, the split and the order of rows")
    load_in_4bit: bool = Field(True, description="train on the base in 4-bit NF4 (QLoRA)")
    eval_interval: int | None = Field(None, ge=1, description="steps between validation losses")
    save_interval: int | None = Field(
        None,
        ge=1,
        description="steps between checkpoints; less where one would fall between two validations of which the better "
        "adapter is kept",
    )
    keep: Literal["best", "last"] = Field(
        "best", description="which adapter is kept: that of the lowest validation loss, where there is one, or the last"
    )
    early_stopping: int | None = Field(
        None, ge=1, description='stop after this many validations without a better loss; needs keep = "best"'
    )
    max_length: int | None = Field(None, ge=8, description="longest row, in tokens")
    packing: bool = Field(False, description="put several rows into one sequence (on a GPU)")
    gradient_checkpointing: bool | None = Field(None, description="recompute activations to save memory")
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = Field("none", description="experiment tracker")

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("train.epochs and train.steps exclude each other: keep one")
        if self.early_stopping is not None and self.keep == "last":
            raise ValueError('train.early_stopping keeps the best adapter: remove it, or train.keep = "last"')
        return self


class Merge(Section):
    """How the adapter becomes part of the weights."""

    base: Literal["auto", "16bit", "dequantized"] = Field(
        "auto",
        description="the base to merge into: as it is stored, the 4-bit one dequantized, or (auto) whichever of them "
        "gives the lower held-out loss",
    )
    model: str | None = Field(
        None,
        min_length=1,
        description="the 16-bit model that a base in bitsandbytes' 4 bits was made of, to merge into it: a hub id or "
        "a local folder",
    )
    way: Literal["tensors", "peft"] = Field(
        "tensors",
        description="tensors: one after the other, from file to file, in little memory; peft: by PEFT's "
        "merge_and_unload, with the whole model in memory",
    )
    keep: bool = Field(
        True,
        description="false: remove the merged weights once the 16-bit GGUF file is proven against them",
    )


class Export(Section):
    """Which GGUF files are made."""

    quant: Names = Field(("q4_k_m",), description="quantization types of llama-quantize")
    outtype: Literal["auto", "f16", "bf16"] = Field("auto", description="16-bit type; auto: as the base is stored")
    as_: Literal["merged", "adapter"] = Field(
        "merged",
        alias="as",
        description="merged: files of the merged model; adapter: files of the base, and the adapter as a file of its "
        "own beside them, so that models on one base share it",
    )

    @field_validator("quant", mode="before")
    @classmethod
    def _list_of_names(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
            return tuple(dict.fromkeys(name.lower() for name in names))
        return value


TEMPLATE_WAYS = ("auto", "go", "native")  # what ollama.template may be beside a file


class Ollama(Section):
    """How the result is served."""

    name: str | None = Field(None, description="the model's name in Ollama")
    system: str | None = Field(None, description="default system message")
    template: str = Field("auto", description="auto, go, native, or the path of a Go template")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Ollama's PARAMETERs, e.g. { temperature = 0 }"
    )
    host: str | None = Field(None, description="address of a running Ollama")
    license: str | None = Field(None, description="licence text or name")
    replace: bool = Field(False, description="replace a model of this name that this run did not make")

    @property
    def own_template(self) -> Path | None:
        """The user's own Go template; None where a way to render is chosen by its name."""
        return None if self.template in TEMPLATE_WAYS else Path(self.template)


class Eval(Section):
    """How answers are judged."""

    metric: Literal["json", "text", "none"] = Field("text", description="json: equal objects; text: equal strings")
    limit: int | None = Field(None, ge=1, description="how many test questions are asked, the first ones")
    minutes: float | None = Field(
        None, gt=0, description="most minutes that each rung is asked: as many of the first questions as that allows"
    )
    max_new_tokens: int = Field(256, ge=1, description="longest answer, in tokens")


class Verify(Section):
    """What `verify` tolerates. Divergences are in nats."""

    tokens: int | None = Field(None, ge=100, description="held-out tokens on which logits are compared")
    strings: int = Field(5000, ge=100, description="hostile strings that each tokenizer is tried on")
    differing_strings: int = Field(0, ge=0, description="strings that may have other token ids")
    trained_share: float = Field(0.001, ge=0, le=1, description="least share of trained tokens")
    rounding: float = Field(1.0, gt=0, description="largest error of a merged weight, in steps of its stored type")
    divergence: float = Field(1e-4, gt=0, description="largest mean KL divergence of the 16-bit GGUF")
    divergence_999: float = Field(1e-3, gt=0, description="largest 99.9th percentile of it")
    same_top: float = Field(0.995, ge=0, le=1, description="least share of positions with the same likeliest token")
    lead: float = Field(0.01, gt=0, description="largest lead, in log probability, that a likeliest token may lose")
    quantized_divergence: float | None = Field(None, gt=0, description="largest mean KL divergence of a quantized file")
    quantization_error: float | None = Field(None, gt=0, description="largest relative error of a quantized tensor")
    fallback: float = Field(1.0, ge=0, le=1, description="largest share of parameters that fell back to another type")
    stopping_prompts: int = Field(8, ge=1, description="prompts that every server has to answer to the end")
    stopping: float = Field(0.8, ge=0, le=1, description="least share of answers that end by themselves")
    answers_lost: float = Field(0.05, ge=0, le=1, description="largest loss of right answers from a rung to the next")
    loss_lost: float = Field(0.1, gt=0, description="largest rise of the held-out loss between rungs, in nats")


class Run(Section):
    """Where the results are kept."""

    folder: File = Field(Path("run"), description="the run's folder, beside this file")


class Config(Section):
    """All of pipeline.toml. Paths are absolute."""

    # Before the tables: as a value TOML has it only there, and `pipeline config` prints a pipeline.toml.
    adapters: Annotated[tuple[GivenAdapter, ...], Field(strict=False)] = Field(
        (), description="adapters that were trained elsewhere and are combined (adapter.combine), each a table"
    )
    model: Model
    data: Data
    adapter: Adapter = Adapter()
    lora: Lora = Lora()
    train: Train = Train()
    merge: Merge = Merge()
    export: Export = Export()
    ollama: Ollama = Ollama()
    eval: Eval = Eval()
    verify: Verify = Verify()
    run: Run = Run()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.merge.base == "dequantized" and not self.train.load_in_4bit:
            raise ValueError(
                'merge.base = "dequantized" needs a base that was trained in 4 bits, and train.load_in_4bit is false: '
                "remove one of the two"
            )
        if self.merge.model is not None:
            for key, given in (
                ('merge.base = "dequantized"', self.merge.base == "dequantized"),
                ("model.trust_remote_code = true", self.model.trust_remote_code),
            ):
                if given:
                    raise ValueError(f"merge.model does not go with {key}: remove one of the two")
        if self.export.as_ == "adapter":
            self._fits_an_adapter()
        self._can_be_combined()
        if self.train.from_adapter is not None and self.given_adapters:
            raise ValueError("train.from_adapter: nothing is trained with an adapter that is given: remove one of them")
        if self.train.early_stopping and self.data.validation is None and not self.data.validation_fraction:
            raise ValueError(
                "train.early_stopping needs validation data: give data.validation or data.validation_fraction"
            )
        return self

    def _fits_an_adapter(self) -> None:
        if not self.merge.keep:
            raise ValueError(
                'merge.keep = false does not go with export.as = "adapter": the merged model is what the base with its '
                "adapter is held against, and no file is made of it: remove one of the two"
            )
        for key, given in (
            ("lora.dora = true", self.lora.dora),
            (f'lora.bias = "{self.lora.bias}"', self.lora.bias != "none"),
            ("lora.save_modules", bool(self.lora.save_modules)),
            ("model.add_tokens", bool(self.model.add_tokens)),
            ('merge.base = "dequantized"', self.merge.base == "dequantized"),
        ):
            if given:
                raise ValueError(
                    f'{key} does not go with export.as = "adapter": a GGUF adapter holds two matrices for each '
                    "module, which are added to the base as it is stored: remove one of the two"
                )

    def _can_be_combined(self) -> None:
        """What can be said of [[adapters]] before they are looked at."""
        way, adapters = self.adapter.combine, self.adapters
        if not adapters:
            for key, given in (
                ("combine", way != "cat"),
                ("density", self.adapter.density),
                ("rank", self.adapter.rank),
            ):
                if given:
                    raise ValueError(f"adapter.{key} says how [[adapters]] are combined, and there are none: remove it")
            return
        if self.adapter.path is not None:
            raise ValueError("adapter.path and [[adapters]] exclude each other: keep one")
        if zero := next((adapter for adapter in adapters if not adapter.weight), None):
            raise ValueError(f"adapters: {zero.path}: weight = 0 leaves nothing of it: take it out, or give another")
        for what, values in (("path", [str(a.path) for a in adapters]), ("name", [a.called for a in adapters])):
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise ValueError(f"adapters: two of them have the {what} {twice}: give each a {what} of its own")
        if len(adapters) == 1 and way not in ("cat", "linear"):
            raise ValueError(
                f'adapter.combine = "{way}" needs two [[adapters]], and there is one: add one, or remove it'
            )
        prunes = way.startswith(("ties", "dare", "magnitude"))
        if prunes != (self.adapter.density is not None):
            do = (
                "needs adapter.density, the share of the values that it keeps, e.g. 0.5"
                if prunes
                else "knows no density"
            )
            raise ValueError(f'adapter.combine = "{way}" {do}')
        if self.adapter.rank is not None and not way.endswith("svd"):
            raise ValueError(f'adapter.rank is for "svd" and "..._svd", and adapter.combine = "{way}": remove it')

    @property
    def given_adapters(self) -> tuple[Path, ...]:
        """The folders of the adapters that were trained elsewhere; none where one is trained."""
        if self.adapter.path is not None:
            return (self.adapter.path,)
        return tuple(adapter.path for adapter in self.adapters)

    @property
    def tests(self) -> dict[str, Path]:
        """The files of test questions: data.test by "", those of the adapters by what these are called."""
        own = {adapter.called: adapter.test for adapter in self.adapters}
        return {name: test for name, test in ({"": self.data.test} | own).items() if test is not None}

    @property
    def run_folder(self) -> Path:
        """The run's folder."""
        return self.run.folder


HUB = "hf:"  # begins the name of a data set of a hub; see pipeline.data.hub_files
STANDARD_INPUT = Path("-")  # a run keeps what came on it; see pipeline.run.standard_input


def is_on_hub(file: Path) -> bool:
    """Whether a path is the name of a data set of a hub."""
    return str(file).startswith(HUB)


def is_pattern(file: Path) -> bool:
    """Whether a path is no file's, but says which files are meant, e.g. parts/*.jsonl."""
    return any(character in str(file) for character in "*?[") and not file.exists()


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the configuration, dotted; a default of None is explained in `pipeline.defaults.RULES`."""
    for section, table in Config.model_fields.items():
        if section == "adapters":  # a list of tables
            yield section, table
        elif isinstance(table.annotation, type) and issubclass(table.annotation, Section):
            for key, field in table.annotation.model_fields.items():
                yield f"{section}.{field.alias or key}", field


def meanings() -> dict[str, str]:
    """What each key of the configuration means, in a few words."""
    return {key: field.description or "" for key, field in fields()}

"""`pipeline serve`: several adapters on one base in one llama-server, by OpenAI's API.

The base's file is loaded once, and every adapter adds its few megabytes. That each is sent the prompt that it was
trained with rests on one rule: all of them have the very same base file, byte for byte, which holds the tokenizer and
the chat template too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import UserError
from pipeline.resources import expanded
from pipeline.run.layout import Layout

if TYPE_CHECKING:
    from pipeline.config import Config

# What a Modelfile says of an answer and a request to llama-server can say too, by the same name.
_SHARED = (
    "temperature", "top_k", "top_p", "min_p", "seed", "stop", "repeat_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


@dataclass(frozen=True)
class Served:
    """One adapter that is served.

    Attributes:
        name: what requests call it by.
        adapter, base: the GGUF files.
        base_digest: SHA-256 of the base's.
        system: the trained system message; "" for none.
        parameters: what its Modelfile says of answers.
    """

    name: str
    adapter: Path
    base: Path
    base_digest: str
    system: str
    parameters: dict[str, Any]


@click.command(epilog="Example: pipeline serve bash-adapter/ sql-adapter/ --port 8080")
@click.argument(
    "runs",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
    help='A pipeline.toml with export.as = "adapter", its folder or the run\'s, or the folder of a LoRA adapter.',
)
@click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="The address to listen on.")
@click.option("--port", default=8080, type=click.IntRange(0, 65535), help="The port; 0 takes a free one.")
@click.option("--quant", metavar="TYPE", help="Which quantization of the base; without it, the first run's first one.")
@click.option("--context", type=click.IntRange(min=16), help="Tokens of context; without it, what the runs need.")
def serve(runs: tuple[Path, ...], host: str, port: int, quant: str | None, context: int | None) -> None:
    """Serve several adapters on one base, chosen by the model's name.

    A request of OpenAI's API names the adapter as its model, e.g. at /v1/chat/completions. The prompts are the trained
    ones. Ctrl-C stops it. Where PIPELINE_API_KEY is set, every request has to show that key, and beyond this machine
    nothing is served without one. An adapter's folder is exported first, into a folder here.
    """
    from pipeline.console import say
    from pipeline.llamacpp.adapter_proxy import API_KEY, AdapterProxy, ServedAdapter
    from pipeline.ollama.address import is_here
    from pipeline.ollama.serving import llama_server

    key = os.environ.get(API_KEY, "")
    if not key and not is_here(f"http://[{host}]" if ":" in host else f"http://{host}"):
        raise UserError(
            f"--host {host} can be reached from other machines: set the variable {API_KEY} to a key of your own"
        )
    served = together(runs, quant)
    needed = max(each.parameters.get("num_ctx", 4096) for each in served)
    adapters = {
        each.name: ServedAdapter(
            number, each.system, {name: each.parameters[name] for name in _SHARED if name in each.parameters}
        )
        for number, each in enumerate(served)
    }
    first = served[0].base
    with (
        llama_server(first, context or needed, adapters=[each.adapter for each in served]) as server,
        AdapterProxy(server, adapters, host, port, key) as proxy,
    ):
        say(f"one base, {_megabytes(first)}: {first}")
        for each in served:
            say(f"  model {each.name}, {_megabytes(each.adapter)}: {each.adapter}")
        say(f"{proxy.url}/v1 answers{' who shows the key' if key else ''}; Ctrl-C stops it")
        try:
            proxy.serve_forever()
        except KeyboardInterrupt:
            say("stopped")


def together(runs: Sequence[Path], quant: str | None) -> list[Served]:
    """What is served, if it can be served together.

    Args:
        runs: of the command.
        quant: a quantization type; None for the first of the first run.

    Raises:
        UserError: a run has no GGUF adapter or is not as it was made, two have one name, or their base files differ.
    """
    served: list[Served] = []
    for config in (config for given in runs for config in _configs(given, quant)):
        quant = quant or config.export.quant[0]
        served.append(_served(config, quant.lower()))
    names = [each.name for each in served]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"ollama.name: two runs are called {twice[0]!r}: give one of them another name")
    first = served[0]
    for each in served[1:]:
        if each.base_digest != first.base_digest:
            raise UserError(f"{each.name} cannot be served beside {first.name}: {_why(first.base, each.base)}")
    return served


def _configs(given: Path, quant: str | None) -> list[Config]:
    """The configuration of a run, those of all trainings of a file, or an adapter's, exported unless it was."""
    from pipeline.toml_file import load_config, read_run, trainings_of

    path = expanded(given, "RUN")
    if Layout(path).config.is_file() and Layout(path).manifest.is_file():
        return [read_run(path.absolute())]
    if (path / "adapter_config.json").is_file():
        from pipeline.adapter_project import project_of, write_project
        from pipeline.cli import bring_up_to_date, resolved

        if not (project := project_of(path)).is_file():  # it may say of the adapter what its folder does not
            write_project([path], None, None, (), (quant,) if quant else (), "adapter")
        settings, sources = resolved(project, ())
        if settings.export.as_ == "adapter":
            bring_up_to_date(settings, sources, ["modelfile"])
        return [settings]
    file = path / "pipeline.toml" if path.is_dir() else path
    if path.is_dir() and not file.is_file() and (runs := sorted(path.glob("*/manifest.json"))):
        names = ", ".join(run.parent.name for run in runs)  # some may be of trainings that there are no more
        raise UserError(
            f"{path}: holds runs in folders of its own ({names}): give those that are meant, or the pipeline.toml that "
            "they are of"
        )
    return [load_config(file, training=name)[0] for name in trainings_of(file) or ("",)]


def _served(config: Config, kind: str) -> Served:
    from pipeline.ollama.deployment import planned
    from pipeline.run.folder import read_manifest, unchanged

    run, name = config.run_folder, config.ollama.name or "model"
    layout = Layout(run)
    made = read_manifest(run)["stages"]
    for stage in ("convert", f"quantize/{kind}", f"modelfile/{kind}"):
        outputs = made.get(stage, {}).get("outputs")
        problem = "is not made yet" if outputs is None else unchanged(run, outputs)
        if problem or not layout.served_adapters:
            problem = f"{stage} {problem}" if problem else "it has no GGUF adapter"
            raise UserError(f"{run}: {problem}: run `pipeline export --as adapter --quant {kind}` on it first")
    base = layout.quantized(kind)
    plan, _, _ = planned(layout.create_request(kind).parent)
    return Served(
        name=name,
        adapter=layout.gguf_adapter,
        base=base,
        base_digest=made[f"quantize/{kind}"]["outputs"][str(base.relative_to(run))]["sha256"],
        system=plan.system,
        parameters=plan.parameters,
    )


def _why(ours: Path, theirs: Path) -> str:
    """What differs in two base files."""
    from pipeline.llamacpp.gguf_file import inspect

    first, second = inspect(ours).metadata, inspect(theirs).metadata
    if first.get("tokenizer.chat_template") != second.get("tokenizer.chat_template"):
        return "they were trained with other chat templates, and a server has one"
    if different := [key for key in first if key.startswith("tokenizer.") and first[key] != second.get(key)]:
        return f"they were trained with other tokenizers ({different[0]})"
    return f"they were trained on other bases ({ours} and {theirs} differ)"


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:,.1f} MB"

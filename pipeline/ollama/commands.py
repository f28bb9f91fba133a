"""`pipeline template` and `pipeline chat`: look at how a model is spoken to, and speak to it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import UserError
from pipeline.resources import expanded

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.ollama.rendering import Choice
    from pipeline.prompt.template import ChatTemplate

Stream = Callable[[list[dict[str, Any]]], Iterator[str]]


@click.command(epilog="Example: pipeline template smollm2-135m-instruct")
@click.argument("model", help="A model's folder, a packaged name, a hub id, a GGUF file or a .jinja file.")
@click.option(
    "--way",
    default="auto",
    metavar="WAY",
    help="auto (default), go, native, or the path of a Go template, as [ollama] template.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def template(model: str, way: str, as_json: bool) -> None:
    """Show how a model's chat template reaches Ollama, and prove it.

    The template is tried on the conformance suite in a real Ollama and llama.cpp: the way that is chosen, the TEMPLATE,
    and every conversation's result are shown. Exit status 1 if no way is exact.
    """
    from pipeline.ollama.rendering import choose

    chosen = choose(_chat_template_of(model), way)
    if as_json:
        click.echo(json.dumps(_as_json(chosen), ensure_ascii=False, indent=2))
    else:
        _show(chosen)
    if chosen.way == "refused":
        sys.exit(1)


def _chat_template_of(model: str) -> ChatTemplate:
    from pipeline.prompt.template import ChatTemplate

    path = expanded(model, "MODEL")
    if path.suffix == ".gguf":
        from pipeline.llamacpp.gguf_template import template_of

        return template_of(path)
    if path.is_file() or path.suffix == ".jinja":
        return ChatTemplate.from_file(path)
    if path.is_dir():
        return ChatTemplate.from_folder(path)
    from pipeline.model.base import resolve_base

    return ChatTemplate.from_folder(resolve_base(model))


def _as_json(chosen: Choice) -> dict[str, Any]:
    return {
        "way": chosen.way,
        "reason": chosen.reason,
        "template": chosen.go_template,
        "derived": chosen.derivation.template if chosen.derivation else None,
        "requires": chosen.requires,
        "warnings": list(chosen.warnings),
        "suite": {
            way: {
                outcome.name: {"status": outcome.status}
                | ({"trained": outcome.expected, "sent": outcome.served} if outcome.served else {})
                | ({"words": outcome.words} if outcome.words else {})
                for outcome in report.outcomes
            }
            for way, report in chosen.reports.items()
        },
    }


def _show(chosen: Choice) -> None:
    from rich.table import Table

    from pipeline.console import results
    from pipeline.ollama.rendering import REMEDY, explain
    from pipeline.prompt.conformance import HARMLESS

    click.echo(f"way: {chosen.way}\n{chosen.reason}\n")
    shown = chosen.go_template or (chosen.derivation.template if chosen.derivation else None)
    if shown:
        click.echo(f"{'TEMPLATE' if chosen.way == 'go' else 'derived, not used'}:\n{shown}\n")
    table = Table(box=None, pad_edge=False)
    table.add_column("conversation")
    for way in chosen.reports:
        table.add_column(way)
    ways = [{outcome.name: outcome for outcome in report.outcomes} for report in chosen.reports.values()]
    for name in ways[0] if ways else ():
        cells = [way[name].status for way in ways]
        table.add_row(name, *(cell if cell in HARMLESS else f"[red]{cell}[/red]" for cell in cells))
    results().print(table)
    for way, report in chosen.reports.items():
        click.echo(f"{way}: {report.summary}")
        difference = report.first_difference()
        if difference is not None:
            click.echo(explain(difference))
    for warning in chosen.warnings:
        click.echo(f"warning: {warning}")
    if chosen.way == "refused":
        click.echo(REMEDY)


@click.command(epilog='Example: pipeline chat my/pipeline.toml -m "Close the garage door"')
@click.argument(
    "config",
    type=click.Path(path_type=Path),
    default="pipeline.toml",
    help="The pipeline.toml of a run that is done, or its folder; without it, the one in this folder.",
)
@click.option(
    "--gguf",
    is_flag=False,
    flag_value="",
    metavar="[FILE]",
    help="Ask a GGUF file through llama-server: the run's first quantized one, or the one that is named.",
)
@click.option("--adapter", is_flag=True, help="Ask the trained adapter on its base, with transformers.")
@click.option("-m", "--message", help="Ask this, and end.")
@click.option("--system", help="A system message instead of the trained one.")
def chat(config: Path, gguf: str | None, adapter: bool, message: str | None, system: str | None) -> None:
    """Talk to the result: in Ollama, or at another rung.

    Lines are asked one after the other; an empty line or end of file ends the conversation.
    """
    if adapter and gguf is not None:
        raise UserError("--gguf and --adapter exclude each other")
    with _rung(config, gguf, adapter) as (ask, trained_system):
        system = system if system is not None else trained_system
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        for text in [message] if message is not None else _typed():
            messages.append({"role": "user", "content": text})
            answer = ""
            for piece in ask(messages):
                answer += piece
                click.echo(piece, nl=False)
            click.echo()
            messages.append({"role": "assistant", "content": answer})


def _typed() -> Iterator[str]:
    """Lines from the keyboard or a pipe, up to an empty one."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.rstrip("\r\n")


@contextmanager
def _rung(path: Path, gguf: str | None, adapter: bool) -> Iterator[tuple[Stream, str]]:
    """What answers, and the system text that it has to be given; in Ollama the model has its own."""
    from pipeline.ollama.serving import llama_server

    if gguf:
        with llama_server(Path(gguf)) as server:
            yield server.stream, ""
        return
    from pipeline.config import load_config
    from pipeline.run.layout import Layout

    config, _ = load_config(path / "pipeline.toml" if path.is_dir() else path)
    run = config.run_folder
    layout = Layout(run)
    if gguf == "":
        file = layout.quantized(config.export.quant[0])
        with llama_server(_made(file, "quantize")) as server:
            yield server.stream, config.served_system
    elif adapter:
        yield _adapter(config, _made(layout.adapter, "train")), config.served_system
    else:
        from pipeline.ollama.deployment import deployed

        _made(layout.deployment, "deploy")
        with deployed(run) as served:
            if served is None:
                raise UserError(f"{run}: the model is not in Ollama; `pipeline chat --gguf` asks its file")
            client, name = served
            yield lambda messages: client.stream(name, messages), ""


def _made(path: Path, stage: str) -> Path:
    if not path.exists():
        raise UserError(f"{path}: not there yet; run `pipeline {stage}` first")
    return path


def _adapter(config: Config, folder: Path) -> Stream:
    """The adapter on its base as it was trained, answering greedily."""
    from pipeline.model.generate import stream_answer
    from pipeline.model.load import load_adapter

    model, tokenizer = load_adapter(config.model, folder, in_4bit=config.train.load_in_4bit)
    return lambda messages: stream_answer(model, tokenizer, messages, config.eval.max_new_tokens)

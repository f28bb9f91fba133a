"""`pipeline chat`: talk to the result, in Ollama or at another rung."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import Config

Stream = Callable[[list[dict[str, Any]]], Iterator[str]]


@click.command()
@click.argument("config", type=click.Path(path_type=Path), default="pipeline.toml")
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

    CONFIG is a pipeline.toml whose run is done. Lines are asked one after the other; an empty line or end of file ends
    the conversation.
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

    config, _ = load_config(path / "pipeline.toml" if path.is_dir() else path)
    run = config.run_folder
    if gguf == "":
        kind = config.export.quant[0]
        file = run / "quantize" / kind / f"model-{kind}.gguf"
        with llama_server(_made(file, "quantize")) as server:
            yield server.stream, config.served_system
    elif adapter:
        yield _adapter(config, _made(run / "train" / "adapter", "train")), config.served_system
    else:
        from pipeline.ollama.deployment import deployed

        _made(run / "deploy" / "deploy.json", "deploy")
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
    from pipeline.model.generate import load_adapter, stream_answer

    model, tokenizer = load_adapter(config.model, folder, in_4bit=config.train.load_in_4bit)
    return lambda messages: stream_answer(model, tokenizer, messages, config.eval.max_new_tokens)

"""`pipeline template` and `pipeline chat`: look at how a model is spoken to, and speak to it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import UserError
from pipeline.resources import expanded

if TYPE_CHECKING:
    import httpx

    from pipeline.config import Config
    from pipeline.ollama.rendering import Choice
    from pipeline.prompt.template import ChatTemplate
    from pipeline.run.layout import Layout

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
    help="The pipeline.toml of a run that is done, its folder or the run's; without it, the one in this folder.",
)
@click.option(
    "--gguf",
    is_flag=False,
    flag_value="",
    metavar="[FILE]",
    help="Ask a GGUF file through llama-server: the run's first quantized one, or the one that is named.",
)
@click.option("--adapter", is_flag=True, help="Ask the trained adapter on its base, with transformers.")
@click.option("--server", metavar="URL", help="Ask adapters that are served there, e.g. http://127.0.0.1:8080.")
@click.option("--model", "models", multiple=True, metavar="NAME", help="With --server: the adapter; twice to compare.")
@click.option("--training", "trainings", multiple=True, metavar="NAME", help="One of CONFIG's; twice to compare.")
@click.option("--compare", is_flag=True, help="Ask two: those that are named, or the one that is and Ollama.")
@click.option("-m", "--message", help="Ask this, and end.")
@click.option("--system", help="A system message instead of the trained one.")
def chat(
    config: Path,
    gguf: str | None,
    adapter: bool,
    server: str | None,
    models: tuple[str, ...],
    trainings: tuple[str, ...],
    compare: bool,
    message: str | None,
    system: str | None,
) -> None:
    """Talk to the result: in Ollama, or at another rung.

    Lines are asked one after the other; an empty line or end of file ends the conversation. With --server the line
    /adapter NAME goes on with another adapter, and /adapter alone names those that there are.
    """
    if models and server is None:
        raise UserError("--model goes with --server, the address of a `pipeline serve`")
    rungs: list[tuple[str, AbstractContextManager[tuple[Stream, str]]]] = []
    for training in trainings or ("",):
        if gguf is not None:
            rungs.append((f"{training} gguf".strip(), _rung(config, training, gguf, adapter=False, greedy=compare)))
        if adapter:
            rungs.append((f"{training} adapter".strip(), _rung(config, training, None, adapter=True, greedy=compare)))
    if server is not None:
        rungs += [(name or "server", _on_server(server, name, greedy=compare)) for name in models or ("",)]
    if not rungs or (compare and len(rungs) == 1):
        in_ollama = [
            (f"{training} ollama".strip(), _rung(config, training, None, adapter=False, greedy=compare))
            for training in trainings or ("",)
        ]
        rungs = in_ollama + rungs
    if len(rungs) != 1 + compare:
        named = ", ".join(name for name, _ in rungs)
        raise UserError(f"{named}: exclude each other" if not compare else f"{named}: --compare asks two")
    with ExitStack() as stack:
        asked = [(name, *stack.enter_context(rung)) for name, rung in rungs]
        _converse(asked, [message] if message is not None else _typed(), system)


def _converse(asked: Sequence[tuple[str, Stream, str]], texts: Iterable[str], system: str | None) -> None:
    """Ask every text of each, in a conversation of its own."""
    conversations: list[list[dict[str, Any]]] = []
    for _, _, trained in asked:
        own = system if system is not None else trained
        conversations.append([{"role": "system", "content": own}] if own else [])
    for text in texts:
        command, _, argument = text.partition(" ")
        if command == "/adapter":
            _, ask, _ = asked[-1]
            click.echo(ask.change_to(argument.strip()) if isinstance(ask, _OnServer) else _NO_SWITCH, err=True)
            continue
        answers = []
        for (name, ask, _), messages in zip(asked, conversations, strict=True):
            if len(asked) > 1:
                click.echo(f"{name}: ", nl=False)
            messages.append({"role": "user", "content": text})
            answer = ""
            for piece in ask(messages):
                answer += piece
                click.echo(piece, nl=False)
            click.echo()
            messages.append({"role": "assistant", "content": answer})
            answers.append(answer)
        if len(answers) > 1:
            at = len(os.path.commonprefix(answers))
            same = len(set(answers)) == 1
            click.echo("(the same answer)" if same else f"(they part at character {at})", err=True)


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


_NO_SWITCH = "(only a server has adapters to change to: --server asks one)"


class _OnServer:
    """One of the adapters of a `pipeline serve`; another one after `change_to`."""

    def __init__(self, client: httpx.Client, model: str, *, greedy: bool) -> None:
        self.client = client
        self.options = {"temperature": 0} if greedy else {}
        names = self.models()
        if model and model not in names:
            raise UserError(f"--model {model}: there is none at {client.base_url}; there are {', '.join(names)}")
        self.model = model or names[0]

    def models(self) -> list[str]:
        """The names that the server answers to."""
        import httpx

        try:
            answer = self.client.get("/v1/models").raise_for_status()
            names = [str(row["id"]) for row in answer.json()["data"]]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--server {self.client.base_url}: no `pipeline serve` answers there: {error}") from None
        if not names:
            raise UserError(f"--server {self.client.base_url}: has no adapters")
        return names

    def change_to(self, name: str) -> str:
        """Go on with another adapter, if there is one of this name. Returns which one answers, in words."""
        names = self.models()
        self.model = name if name in names else self.model
        unknown = f"there is no {name}; " if name and name != self.model else ""
        return f"({unknown}{self.model} answers; there are {', '.join(names)})"

    def __call__(self, messages: list[dict[str, Any]]) -> Iterator[str]:
        from pipeline.llamacpp.llama_server import stream_chat

        return stream_chat(self.client, {"model": self.model, "messages": messages, **self.options})


@contextmanager
def _on_server(url: str, model: str, *, greedy: bool) -> Iterator[tuple[Stream, str]]:
    """An adapter on a server, which puts the trained system text in front by itself."""
    import httpx

    from pipeline.llamacpp.adapter_proxy import API_KEY
    from pipeline.ollama.connection import options

    key = os.environ.get(API_KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    address = url.removesuffix("/").removesuffix("/v1")
    try:
        timeout = httpx.Timeout(10, read=600)
        client = httpx.Client(base_url=address, headers=headers, timeout=timeout, **options(address))
    except httpx.InvalidURL as error:
        raise UserError(f"--server {url}: is no address: {error}") from None
    with client:
        yield _OnServer(client, model, greedy=greedy), ""


@contextmanager
def _rung(path: Path, training: str, gguf: str | None, *, adapter: bool, greedy: bool) -> Iterator[tuple[Stream, str]]:
    """What answers, and the system text that it has to be given; in Ollama the model has its own.

    The rungs before Ollama answer greedily; Ollama by the model's own parameters, unless it has to be `greedy` too.
    """
    from pipeline.ollama.serving import llama_server

    if gguf:
        with llama_server(Path(gguf)) as server:
            yield server.stream, ""
        return
    from pipeline.ollama.modelfile_text import served_system
    from pipeline.run.layout import Layout
    from pipeline.toml_file import load_config, read_run

    if Layout(path).config.is_file():
        if training:
            raise UserError(f"--training {training}: {path} is one run's folder: give the trainings' pipeline.toml")
        config = read_run(path.absolute())
    else:
        config, _ = load_config(path / "pipeline.toml" if path.is_dir() else path, training=training)
    run = config.run_folder
    layout = Layout(run)
    if gguf == "":
        file = layout.quantized(config.export.quant[0])
        context = _remembered(layout, config.export.quant[0])
        with llama_server(_made(file, "quantize"), context, adapters=layout.served_adapters) as server:
            yield server.stream, served_system(config)
    elif adapter:
        yield _adapter(config, _made(layout.adapter, "train")), served_system(config)
    else:
        from pipeline.ollama.deployment import deployed

        _made(layout.deployment, "deploy")
        with deployed(run) as served:
            if served is None:
                raise UserError(f"{run}: the model is not in Ollama; `pipeline chat --gguf` asks its file")
            client, name = served
            options = {"temperature": 0} if greedy else {}
            yield lambda messages: client.stream(name, messages, options), ""


def _remembered(layout: Layout, kind: str) -> int | None:
    """The context that Ollama gives the run's model; None where that is not decided yet."""
    from pipeline.ollama.deployment import planned

    request = layout.create_request(kind)
    return int(planned(request.parent)[0].parameters["num_ctx"]) if request.is_file() else None


def _made(path: Path, stage: str) -> Path:
    if not path.exists():
        raise UserError(f"{path}: not there yet; run `pipeline {stage}` first")
    return path


def _adapter(config: Config, folder: Path) -> Stream:
    """The adapter on its base as it was trained, answering greedily."""
    from pipeline.model.generate import stream_answer
    from pipeline.model.load import load_adapter
    from pipeline.model.merge_target import has_two_bases
    from pipeline.model.nf4 import Record

    record = Record.read(folder.parent) if has_two_bases(config) else None
    model, tokenizer = load_adapter(config.model, folder, record)
    return lambda messages: stream_answer(model, tokenizer, messages, config.eval.max_new_tokens)

"""`pipeline template`: show how a model's chat template reaches Ollama, and prove it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from pipeline.resources import expanded

if TYPE_CHECKING:
    from pipeline.ollama.rendering import Choice
    from pipeline.prompt.template import ChatTemplate


@click.command()
@click.argument("model")
@click.option(
    "--way",
    default="auto",
    metavar="WAY",
    help="auto (default), go, native, or the path of a Go template, as [ollama] template.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def template(model: str, way: str, as_json: bool) -> None:
    """Show how a model's chat template reaches Ollama, and prove it.

    MODEL is a model's folder, a packaged name, a hub id, a GGUF file or a .jinja file. The template is tried on the
    conformance suite in a real Ollama and llama.cpp: the way that is chosen, the TEMPLATE, and every conversation's
    result are shown. Exit status 1 if no way is exact.
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

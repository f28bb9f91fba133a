"""`pipeline verify`: the proof as a table, for a run or for an export that another program made."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import Config


@click.command()
@click.argument("config", type=click.Path(path_type=Path), default="pipeline.toml")
@click.option("--hf", type=click.Path(path_type=Path), metavar="DIR", help="A Hugging Face folder, instead of CONFIG.")
@click.option("--gguf", type=click.Path(path_type=Path), metavar="FILE", help="The GGUF file that was made from it.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value, e.g. verify.tokens=1000.")
@click.option("--force", is_flag=True, help="Verify again, also where nothing has changed since.")
@click.option("--json", "as_json", is_flag=True, help="Print verify.json.")
def verify(
    config: Path, hf: Path | None, gguf: Path | None, overrides: tuple[str, ...], force: bool, as_json: bool
) -> None:
    """Prove every stage against the one before it, and name the first broken one.

    CONFIG is a pipeline.toml: what is needed is brought up to date first. It may also be a run's folder, which is taken
    as it is. With --hf and --gguf an export of another program is verified, with the checks that need no more than that.

    Exit status 1 if a check failed. A check that could not run is shown as such, never as passed.
    """
    if (hf is None) != (gguf is None):
        raise UserError("--hf and --gguf belong together: the folder, and the GGUF file that was made from it")
    if hf is not None and gguf is not None:
        content = _export(hf, gguf, overrides)
    elif (config / "config.json").is_file():
        content = _folder(config.absolute(), overrides)
    else:
        content = _configured(config, overrides, force)
    _show(content, as_json)


def _export(hf: Path, gguf: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    from pipeline.verify.chain import EXPORT_CHECKS
    from pipeline.verify.chain import verify as run
    from pipeline.verify.subject import Subject

    with tempfile.TemporaryDirectory(prefix="pipeline-verify-") as scratch:
        subject = Subject.of_export(hf.absolute(), gguf.absolute(), _settings({}, overrides), Path(scratch))
        return run(subject, EXPORT_CHECKS)


def _folder(run_folder: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    from pipeline.config import Config
    from pipeline.verify.chain import verify as run
    from pipeline.verify.result import write
    from pipeline.verify.subject import Subject

    values = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))
    values["run"]["folder"] = str(run_folder)  # it may have been moved
    settings = Config.model_validate(values)
    settings = settings.model_copy(update={"verify": _settings(values["verify"], overrides)})
    with tempfile.TemporaryDirectory(prefix="pipeline-verify-") as scratch:
        content = run(Subject.of_run(run_folder, settings, Path(scratch)))
    (run_folder / "verify").mkdir(exist_ok=True)
    write(run_folder / "verify" / "verify.json", content)
    return content


def _settings(values: dict[str, Any], overrides: tuple[str, ...]) -> Any:
    """[verify] alone, with --set verify.key=value."""
    from pydantic import ValidationError

    from pipeline.config import Verify

    given = dict(values)
    for override in overrides:
        key, _, text = override.partition("=")
        section, _, name = key.strip().partition(".")
        if section != "verify" or name not in Verify.model_fields:
            known = ", ".join(f"verify.{field}" for field in Verify.model_fields)
            raise UserError(f"--set {override}: here only thresholds can be set: {known}")
        given[name] = text.strip()
    try:
        return Verify.model_validate(given)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        raise UserError(f"verify.{detail['loc'][0]} = {detail['input']!r}: {detail['msg']}") from None


def _configured(config: Path, overrides: tuple[str, ...], force: bool) -> dict[str, Any]:
    from pipeline import graph
    from pipeline.cli import resolved

    settings: Config
    settings, sources = resolved(config, overrides)
    graph.run(settings, sources, graph.nodes_of("verify", settings), force=force)
    path = settings.run_folder / "verify" / "verify.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _show(content: dict[str, Any], as_json: bool) -> None:
    from pipeline.verify.result import FAIL, explain, table

    if as_json:
        click.echo(json.dumps(content, indent=1, ensure_ascii=False))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        console.print(table(content))
        counts = ", ".join(f"{count} {verdict}" for verdict, count in content["counts"].items())
        console.print(f"\n{counts}")
        if content["verdict"] == FAIL:
            console.print(explain(content), style="bold red", markup=False, soft_wrap=True)
    if content["verdict"] == FAIL:
        sys.exit(1)

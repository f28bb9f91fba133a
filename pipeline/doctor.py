"""`pipeline doctor`: one table of what this machine has and lacks, with what to do about it.

The machine, its GPU and the libraries are judged in `pipeline.setup`, for set-up and preflight as well; here only what
those have no use for is judged, such as whether the programs that were built start.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.setup.machine_findings import Finding


@click.command(epilog="Example: pipeline doctor my/pipeline.toml --json")
@click.argument(
    "config",
    type=click.Path(path_type=Path),
    required=False,
    help="A pipeline.toml, or its folder: its run's disk is looked at too. Without it, the one in this folder, if any.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(config: Path | None, as_json: bool) -> None:
    """Show what this machine has and lacks, and what to do about it.

    Set-up and preflight ask the same questions. Exit status 1 where the main job, from a base to GGUF files and their
    answers, cannot run.
    """
    from pipeline.console import results
    from pipeline.setup.machine_findings import FAILURE, OK, WARNING

    findings = list(examine(config))
    failed = any(finding.state == FAILURE for finding in findings)
    if as_json:
        rows = [finding.as_json() for finding in findings]
        click.echo(json.dumps({"verdict": FAILURE if failed else OK, "findings": rows}, indent=1, ensure_ascii=False))
        sys.exit(failed)
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in ("found", "what to do"):
        table.add_column(heading, overflow="fold")
    styles = {OK: "green", WARNING: "yellow", FAILURE: "bold red"}
    for finding in findings:
        state = Text(finding.state, style=styles[finding.state])
        table.add_row(Text(finding.subject), state, Text(finding.found), Text(finding.remedy))
    results().print(table)
    sys.exit(failed)


def examine(config: Path | None) -> Iterator[Finding]:
    """Look at everything that a run needs, in the order in which set-up brings it.

    Args:
        config: a pipeline.toml, or its folder; None: the one in this folder, if there is one.

    Raises:
        UserError: a configuration that was named cannot be read.
    """
    from pipeline.setup import gpu, libraries, machine, places
    from pipeline.setup.pins import load_pins
    from pipeline.toml_file import load_config, trainings_of

    path = config or Path("pipeline.toml")
    path = path / "pipeline.toml" if path.is_dir() else path
    settings = None
    if config is not None or path.is_file():  # of several trainings the first stands for all: they share the machine
        settings, _ = load_config(path, training=next(iter(trainings_of(path)), ""))
    programs = places.llamacpp_folder()
    yield machine.python()
    yield libraries.look()
    yield from machine.compilers(needed=programs is None)
    yield _llama_cpp(programs)
    yield _packaged_base()
    yield machine.go(needed=places.ollama_program() is None)
    yield _ollama(settings.ollama.host if settings else None)
    yield from _disks(settings)
    yield machine.memory()
    torch = {package.name: package.version for package in libraries.this_environment().installed()}.get("torch")
    yield from gpu.look(gpu.gpus(), libraries.locked_cuda(), torch)
    if not places.tokenizer_home(next(iter(load_pins().tokenizers.values()))).is_dir():
        from pipeline.setup.machine_findings import OK, Finding

        yield Finding("tokenizers for the tests", OK, "not fetched: only `make test` needs them")


def _llama_cpp(programs: Path | None) -> Finding:
    import subprocess

    from pipeline.setup.machine_findings import FAILURE, OK, Finding
    from pipeline.setup.pins import load_pins

    pin = load_pins().llama_cpp
    if programs is None:
        return Finding("llama.cpp", FAILURE, f"{pin.version} is not built here", "run `pipeline setup`")
    absent = [name for name in pin.later if not (programs / name).is_file()]
    if absent:
        return Finding("llama.cpp", FAILURE, f"{', '.join(absent)} not built yet", "run `pipeline setup`")
    answer = subprocess.run([programs / "llama-server", "--version"], capture_output=True, text=True, check=False)
    if answer.returncode:
        words = f"llama-server does not start: {answer.stderr.strip()[:200] or answer.returncode}"
        return Finding("llama.cpp", FAILURE, words, f"delete {programs.parent} and run `pipeline setup`")
    return Finding("llama.cpp", OK, f"{pin.commit}, {programs}")


def _packaged_base() -> Finding:
    from pipeline.setup import places
    from pipeline.setup.machine_findings import OK, WARNING, Finding

    wheel = places.packaged_base_wheel()
    if wheel is None:
        return Finding("packaged model", WARNING, "not fetched: the example cannot run", "run `pipeline setup`")
    return Finding("packaged model", OK, str(wheel))


def _ollama(host: str | None) -> Finding:
    """The Ollama that `deploy` would take, by its own rule."""
    from pipeline.errors import UserError
    from pipeline.ollama.target import find
    from pipeline.setup.machine_findings import FAILURE, OK, WARNING, Finding
    from pipeline.setup.ollama_version import program_version

    try:
        found = find(host)
    except UserError as error:
        return Finding("Ollama", FAILURE, str(error))
    if found.running is not None:
        with found.running as client:
            return Finding("Ollama", OK, f"{client.version}, running at {client.host}")
    if found.program is None:
        return Finding(
            "Ollama",
            WARNING,
            "none: all the rest works, and `deploy` says what to type elsewhere",
            "install Go and run `pipeline setup`, or install Ollama",
        )
    return Finding("Ollama", OK, f"{program_version(found.program)}, {found.program}, started for the run")


def _disks(settings: Config | None) -> Iterator[Finding]:
    import os

    from pipeline.resources import cache_folder
    from pipeline.setup import libraries, machine
    from pipeline.setup.command import wanted_parts

    parts, _ = wanted_parts(dev=False, say_own=False)
    environment = libraries.this_environment()
    missing = libraries.differences(libraries.locked(), environment, libraries.AUTO)
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub")
    needs: dict[Path, float] = {
        cache_folder(): sum(part.space for part in parts if not part.done),
        environment.prefix: libraries.space_for(missing),
        hub.expanduser(): 0,
    }
    roles = dict(zip(needs, ("the cache", "the libraries", "the hub"), strict=True))
    if settings is not None:
        needs[settings.run_folder] = machine.LEAST_FOR_A_RUN
        roles[settings.run_folder] = "the run"
    yield from machine.space(needs, "a run with its set-up" if settings else "set-up", roles)

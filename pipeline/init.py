"""`pipeline init`: a pipeline.toml with the keys that people change, and a few rows of the example; ready to run."""

from __future__ import annotations

import itertools
import os
import shlex
from contextlib import suppress
from pathlib import Path

import click

# How many rows of the example: a run with them takes minutes on a processor, and still has something to prove.
ROWS = {"train.jsonl": 160, "test.jsonl": 20}


@click.command(epilog="Example: pipeline init my-model")
@click.argument(
    "folder",
    type=click.Path(path_type=Path),
    default=".",
    help="Where to write; made if it is not there. Without it, this folder.",
)
def init(folder: Path) -> None:
    """Write a pipeline.toml and sample rows to start from.

    The configuration has the keys that people change, each with its meaning, and runs as it is. Nothing that is there
    already is overwritten: then nothing is written, and the exit status is 2.
    """
    from pipeline.console import say
    from pipeline.resources import expanded

    folder = expanded(folder, "FOLDER")
    write_new(folder, starting_files())
    say(f"written to {folder}: pipeline.toml, {', '.join(ROWS)}. Next:")
    for command in next_commands(folder):
        say(f"  {command}")


def starting_files() -> dict[str, str]:
    """The files of a new project: name -> text."""
    from jinja2 import Environment, StrictUndefined

    from pipeline.config import meanings
    from pipeline.resources import resource

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701 - TOML, not HTML
    template = environment.from_string(resource("templates/pipeline.toml.j2").read_text(encoding="utf-8"))
    texts = {"pipeline.toml": template.render(meaning=meanings())}
    for name, count in ROWS.items():
        with resource(f"examples/home/{name}").open(encoding="utf-8") as rows:
            texts[name] = "".join(itertools.islice(rows, count))
    return texts


def write_new(folder: Path, texts: dict[str, str]) -> None:
    """Write files that are not there yet: all of them or none.

    Args:
        folder: made if it is not there.
        texts: name -> text.

    Raises:
        UserError: one of the files, or something that is no folder, is there already.
        OSError: the disk is full or may not be written to; what was written is removed again.
    """
    from pipeline.errors import UserError

    there = [str(folder / name) for name in texts if os.path.lexists(folder / name)]
    if there:
        raise UserError(
            f"{', '.join(there)}: there already, and nothing is overwritten; give another folder, e.g. "
            "`pipeline init my-model`, or move what is there away"
        )
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with (folder / name).open("x", encoding="utf-8", newline="\n") as file:
                written.append(folder / name)
                file.write(text)
    except (FileExistsError, NotADirectoryError) as error:
        _remove(written)
        raise UserError(f"{error.filename}: is a file; give the name of a folder") from None
    except OSError:
        _remove(written)
        raise


def _remove(written: list[Path]) -> None:
    for path in written:
        with suppress(OSError):
            path.unlink()


def next_commands(folder: Path) -> list[str]:
    """What to type after `pipeline init`."""
    here = folder.resolve() == Path.cwd()
    return [
        *([] if here else [f"cd {shlex.quote(str(folder))}"]),
        "pipeline config    # every key, its value, its meaning",
        "pipeline data      # are the rows right?",
        "pipeline run       # from the base to an answer in Ollama",
    ]

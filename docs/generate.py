"""The generated parts of the documentation: pages that are what the code says, and fall behind when the code goes on.

    python -m docs.generate            writes them anew (`make docs`)
    python -m docs.generate --check    names those that are behind (`make lint`)

`commands.md` is the help page of every command, `configuration.md` every key of pipeline.toml; README.md has a table of
the commands between two markers.
"""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from pipeline.cli import main
from pipeline.config import Config, Data, GivenAdapter, Model, Source, fields
from pipeline.defaults import RULES, Facts, resolve

REPOSITORY = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- commands: written by docs/generate.py -->\n", "<!-- end of commands -->\n"
WIDTH = 100  # columns of a help page

# For these the reference shows what the defaults come to.
MACHINES = {
    "135 M parameters, no GPU": Facts(135_000_000, 8192, None),
    "1.7 B, no GPU": Facts(1_700_000_000, 8192, None),
    "8 B, a GPU with 24 GiB": Facts(8_000_000_000, 131072, 24 * 2**30),
    "70 B, a GPU with 80 GiB": Facts(70_000_000_000, 131072, 80 * 2**30),
}


def generated(root: Path = REPOSITORY) -> dict[Path, str]:
    """What each file with a generated part is to hold."""
    readme = root / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    return {
        root / "docs" / "commands.md": commands_page(),
        root / "docs" / "configuration.md": configuration_page(),
        readme: before + BEGIN + commands_table() + END + after,
    }


def behind(root: Path = REPOSITORY) -> list[Path]:
    """The files that do not hold what they are to hold."""
    return [
        path for path, text in generated(root).items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def commands() -> Iterator[tuple[str, click.Command]]:
    """The name and the command of everything that can be typed, in the order of the help page."""
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        yield name, command


def help_page(command: click.Command, name: str) -> str:
    """What `NAME --help` prints."""
    settings = main.context_settings
    return command.get_help(click.Context(command, info_name=name, terminal_width=WIDTH, **settings))


def commands_page() -> str:
    """The help page of every command."""
    pages = [("pipeline", help_page(main, "pipeline"))]
    pages += [(f"pipeline {name}", help_page(command, f"pipeline {name}")) for name, command in commands()]
    parts = [
        "# Commands",
        "What `pipeline --help` and `pipeline COMMAND --help` print. Written by `docs/generate.py`.",
        *(f"## {name}\n\n```text\n{page}\n```" for name, page in pages),
    ]
    return "\n\n".join(parts) + "\n"


def commands_table() -> str:
    """One line a command, each with a link to its help page."""
    rows = ["| command | what it does |", "|---|---|"]
    for name, command in commands():
        context = click.Context(command)
        arguments = "".join(f" {p.make_metavar(context)}" for p in command.params if isinstance(p, click.Argument))
        link = f"docs/commands.md#pipeline-{name}"
        rows.append(f"| [`pipeline {name}{arguments}`]({link}) | {command.get_short_help_str(WIDTH * 2)} |")
    return "\n".join(rows) + "\n"


def configuration_page() -> str:
    """Every key: meaning, type, default, and where the default comes from."""
    parts = [
        "# Configuration",
        "Every key of `pipeline.toml`. Only `model.base` and `data.train`, or `adapter.path` or "
        "`[[adapters]]` in its place, must be given. A path is taken from the folder of the file. "
        "Each of [`[[trainings]]`](train.md#several-adapters-on-one-base) has a `name` and keys of its own out of "
        "these, all but those of the base, the run and adapters. "
        "`pipeline config` prints the same keys with the values that a run would have, and where "
        "each came from; `--set section.key=value` overrides one for one command. Written by `docs/generate.py`.",
    ]
    sections: dict[str, list[str]] = {}
    keys = [(key, field) for key, field in fields() if "." in key]
    keys += [(f"adapters.{name}", field) for name, field in GivenAdapter.model_fields.items()]
    for key, field in keys:
        section, name = key.split(".")
        cells = (f"`{name}`", field.description or "", type_of(field), default_of(key, field))
        sections.setdefault(section, []).append(_row(*cells))
    for section, rows in sections.items():
        several = section == "adapters"  # a list of tables
        table = GivenAdapter if several else Config.model_fields[section].annotation
        assert table is not None
        parts += [f"## [[{section}]]" if several else f"## [{section}]", table.__doc__ or ""]
        parts.append("\n".join([_row("key", "meaning", "type", "default"), "|---|---|---|---|", *rows]))
    parts += [
        "## Defaults that depend on the base and the machine",
        "They are chosen in `pipeline/defaults.py`, and come to this:",
        _defaults_table(),
    ]
    return "\n\n".join(parts) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _defaults_table() -> str:
    config = Config(model=Model(base="a-base"), data=Data(train=Path("train.jsonl")))
    columns = [resolve(config, {}, facts)[0].model_dump(mode="json") for facts in MACHINES.values()]
    rows = [_row("key", *MACHINES), "|---" * (1 + len(MACHINES)) + "|"]
    for section, key in (name.split(".") for name, _ in fields() if name in RULES):
        values = [column[section][key] for column in columns]
        if any(value != values[0] for value in values):
            rows.append(_row(f"`{section}.{key}`", *("not set" if v is None else f"`{json.dumps(v)}`" for v in values)))
    return "\n".join(rows)


def default_of(key: str, field: FieldInfo) -> str:
    """The default of a key as TOML, or the rule that stands in for it."""
    if field.is_required():
        return "must be given"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return RULES[key]
    return f"`{json.dumps(str(default) if isinstance(default, Path) else default)}`"


NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Path: "path",
    dict: "table",
    Source: "table",
}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def type_of(field: FieldInfo) -> str:
    """The type of a key in words, with its bounds."""
    bounds = [
        f"{word} {getattr(limit, name)}"
        for name, word in BOUNDS.items()
        for limit in field.metadata
        if hasattr(limit, name)
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return ", or ".join(_type(part) for part in get_args(annotation) if part is not type(None))
    if origin is tuple:
        return f"list of {_type(get_args(annotation)[0])}s"
    return NAMES[origin or annotation]


if __name__ == "__main__":
    names = [str(path.relative_to(REPOSITORY)) for path in behind()]
    if "--check" in sys.argv[1:]:
        if names:
            sys.exit(f"error: behind the code: {', '.join(names)}. Type `make docs`, which writes them anew")
    else:
        for path, text in generated().items():
            path.write_text(text, encoding="utf-8")
        print(f"written anew: {', '.join(names) or 'nothing was behind the code'}")

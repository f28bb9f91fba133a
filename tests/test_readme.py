"""The README's table of commands is the program's own help. UPDATE_README=1 writes it anew."""

import os
import re
from pathlib import Path

import click

from pipeline.cli import main
from pipeline.stages import NAMES, declared, summary

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- commands: written by tests/test_readme.py -->\n"
END = "<!-- end of commands -->"


def commands_table() -> str:
    context = click.Context(main)
    rows = ["| command | what it does |", "|---|---|"]
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        arguments = " ".join(p.make_metavar(context) for p in command.params if isinstance(p, click.Argument))
        options = " ".join(f"`{p.opts[0]}`" for p in command.params if isinstance(p, click.Option) and p.opts)
        rows.append(f"| `{f'pipeline {name} {arguments}'.strip()}` | {command.get_short_help_str(200)} {options} |")
    return "\n".join(rows) + "\n"


def test_table_of_commands_is_the_help() -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    if os.environ.get("UPDATE_README"):
        README.write_text(before + BEGIN + commands_table() + END + after, encoding="utf-8")
    else:
        assert table == commands_table(), "give UPDATE_README=1 to pytest to write the table anew"


def test_every_stage_has_a_command() -> None:
    assert set(NAMES) <= set(main.list_commands(click.Context(main)))
    for name in NAMES:
        assert declared(name).name == name
        assert declared(name).summary == summary(name)  # what the help page reads from the text


def test_readme_names_only_commands_that_exist() -> None:
    known = set(main.list_commands(click.Context(main)))
    named = set(re.findall(r"`pipeline (\w+)", README.read_text(encoding="utf-8")))
    named |= set(re.findall(r"^    pipeline (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert named
    assert named <= known

"""The documentation is true: generated parts are what the code says, and what is shown to be typed exists."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
from support.commands import pipeline

from pipeline.cli import main
from pipeline.config import Config, fields
from pipeline.stages import NAMES
from pipeline.toml_file import load_config, trainings_of

ROOT = Path(__file__).parent.parent
GENERATOR = ROOT / "docs" / "generate.py"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = main.list_commands(click.Context(main))
KEYS = {key for key, _ in fields()}


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks of a language with the place of each."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield f"{page.relative_to(ROOT)}:{text[: block.start()].count(chr(10)) + 1}", block[1]


def lines_typed() -> Iterator[tuple[str, list[str]]]:
    """Every command line of the pages and the help pages, split into words, with its place."""
    for place, block in blocks("sh"):
        for line in block.splitlines():
            if words := shlex.split(line, comments=True):
                yield place, words
    for page in PAGES:
        for code in re.findall(r"`(pipeline [^`\n]+|make [a-z][^`\n]*)`", page.read_text(encoding="utf-8")):
            if not re.search(r"\bCOMMAND\b|\[[A-Z]+\]$", code):  # a pattern: `pipeline chat [CONFIG]`
                yield str(page.relative_to(ROOT)), shlex.split(code)
    for name in COMMANDS:
        yield f"pipeline {name} --help", example_of(name)


def example_of(name: str) -> list[str]:
    """The example on a command's help page."""
    command = main.get_command(click.Context(main), name)
    assert command is not None
    found = re.fullmatch(r"Example: (pipeline .+)", command.epilog or "")
    assert found, f"the help page of {name} ends without an example"
    return shlex.split(found[1])


def parse(place: str, words: list[str]) -> None:
    """Have click parse a command line, without running it."""
    try:
        context = main.make_context("pipeline", words[:1])  # which may be --help
        name, command, rest = main.resolve_command(context, words)
        assert name is not None
        assert command is not None
        parameters = command.make_context(name, rest, parent=context).params
    except click.exceptions.Exit:  # --help, --version
        return
    except click.ClickException as error:
        raise AssertionError(f"{place}: pipeline {shlex.join(words)}: {error.format_message()}") from None
    for override in parameters.get("overrides") or ():
        assert override.partition("=")[0] in KEYS | {"section.key"}, f"{place}: {override}"
    assert parameters.get("until") in (None, *NAMES), place


@pytest.fixture
def generator() -> ModuleType:
    specification = importlib.util.spec_from_file_location("docs_generate", GENERATOR)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_generated_parts_are_what_the_code_says() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "docs.generate", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.parametrize("name", ["README.md", "docs/commands.md", "docs/configuration.md"])
def test_a_page_that_falls_behind_is_named(tmp_path: Path, generator: ModuleType, name: str) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    page = tmp_path / name
    text = page.read_text(encoding="utf-8")
    assert generator.behind(tmp_path) == []
    page.write_text(re.sub("Merge the adapter|the adapter's input", "x", text, count=1), encoding="utf-8")
    assert generator.behind(tmp_path) == [page]


def test_what_is_typed_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    seen = set()
    for place, words in lines_typed():
        if words[0] == "pipeline":
            parse(place, words[1:])
            seen |= {words[1]} & set(COMMANDS)
        elif words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, f"{place}: {shlex.join(words)}"
    assert seen == set(COMMANDS)


def test_a_line_that_does_not_exist_is_found() -> None:
    for wrong in (["trian"], ["run", "--unti", "x"], ["run", "--set", "train.epoch=1"], ["run", "--until", "end"]):
        with pytest.raises(AssertionError):
            parse("here", wrong)


def test_every_configuration_loads(tmp_path: Path) -> None:
    shown = list(blocks("toml"))
    assert {place.partition(":")[0] for place, _ in shown} >= {
        f"docs/{name}.md" for name in ("train", "data", "export", "ollama", "verify", "gpu")
    }
    for name in ("train", "validation", "test", "sql", "tone", "sql-test", "tone-test"):
        (tmp_path / f"{name}.jsonl").touch()
    for name in ("their", "sql", "tone"):
        (tmp_path / f"{name}-adapter").mkdir()
    for place, text in shown:
        file = tmp_path / f"{place.replace('/', '-')}.toml"
        file.write_text(text, encoding="utf-8")
        for training in trainings_of(file) or ("",):
            load_config(file, training=training)


def test_every_key_that_is_named_exists() -> None:
    sections = "|".join(Config.model_fields)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for key in re.findall(rf"`(?:--set )?((?:{sections})\.\w+)(?: ?=[^`\n]*)?`", text):
            if not key.endswith((".md", ".py", ".toml", ".json", ".jsonl", ".svg")):
                assert key in KEYS, f"{page.name}: {key}"
        for section in re.findall(r"`\[(\w+)\]`", text):
            assert section in {*Config.model_fields, "CONFIG"}, f"{page.name}: [{section}]"


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if target.startswith(("https:", "http:")):
                continue
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            assert file.is_file(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """What a link into a page may name: its headings in lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == {page.name for page in (ROOT / "docs").glob("*.md")} - {
        "README.md"
    }


def test_every_stage_has_a_command() -> None:
    assert set(NAMES) <= set(COMMANDS)


def test_the_list_of_commands_says_what_each_page_says() -> None:
    listed = " ".join(pipeline("--help").output.split())
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert f"{name} {command.get_short_help_str(200)}" in listed, name

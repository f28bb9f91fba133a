"""A Modelfile that says exactly what is meant, or none.

The format has no escapes: three quotes at the end of a line end a text, and characters that Go calls non-printable
vanish. So a Modelfile is rendered, then read back by the rules of Ollama's own parser, and refused unless the same
instructions come out. That is also what makes it injection-proof: a text that could become an instruction does not
read back. Everything can be sent through the JSON API instead, which is what `deploy` does.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.resources import resource

if TYPE_CHECKING:
    from pipeline.config import Config

ROLES = ("system", "user", "assistant")
_COMMANDS = (
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message",
    "requires",
)  # fmt: skip
_QUOTES = '"""'

Instruction = tuple[str, str]


class CannotCarry(UserError):
    """The Modelfile format cannot carry this; the JSON API can."""


def served_system(config: Config) -> str:
    """The served model's system text: rows without a system message were trained with data.system."""
    return config.ollama.system if config.ollama.system is not None else config.data.system or ""


@dataclass(frozen=True)
class ServedModel:
    """What `ollama create` is told.

    No stage sets messages: the pipeline puts into a prompt only what was trained.

    Attributes:
        gguf: the model's file, relative to the folder of the Modelfile.
        template: Go TEMPLATE; "" for none.
        system: default system message; "" for none.
        parameters: PARAMETERs; "stop" is a list.
        adapter: a LoRA adapter's GGUF file, relative too; "" for none.
        messages: a conversation that precedes every other.
        licenses: licence texts.
        requires: oldest Ollama that can serve it; "" for any.
    """

    gguf: str
    template: str = ""
    system: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    adapter: str = ""
    messages: tuple[dict[str, str], ...] = ()
    licenses: tuple[str, ...] = ()
    requires: str = ""

    def __post_init__(self) -> None:
        for message in self.messages:
            if message.get("role") not in ROLES:
                raise UserError(f"a MESSAGE's role is one of {', '.join(ROLES)}, not {message.get('role')!r}")
        if self.requires and not re.fullmatch(r"\d+\.\d+\.\d+", self.requires):
            raise UserError(f"REQUIRES takes a version such as 0.34.0, not {self.requires!r}")

    def body(self) -> dict[str, Any]:
        """The fields of `POST /api/create` but `files` and `adapters`, which name uploads by their digests."""
        fields = {
            "template": self.template,
            "system": self.system,
            "parameters": self.parameters,
            "messages": list(self.messages),
            "license": list(self.licenses),
            "requires": self.requires,
        }
        return {key: value for key, value in fields.items() if value}

    def instructions(self) -> Iterator[Instruction]:
        """What a Modelfile for this has to read back as."""
        yield "from", self.gguf
        for name, text in (("adapter", self.adapter), ("template", self.template), ("system", self.system)):
            if text:
                yield name, text
        for key, value in self._parameters():
            yield key, value if isinstance(value, str) else str(value)
        for message in self.messages:
            yield "message", f"{message['role']}: {message['content']}"
        for text in self.licenses:
            yield "license", text
        if self.requires:
            yield "requires", self.requires

    def _parameters(self) -> list[tuple[str, Any]]:
        """One line each, "stop" one for every text."""
        lines: list[tuple[str, Any]] = []
        for key, value in self.parameters.items():
            plain = str(value).lower() if isinstance(value, bool) else value
            lines += [(key, text) for text in value] if isinstance(value, list) else [(key, plain)]
        return lines

    def modelfile(self) -> str:
        """The Modelfile's text.

        Raises:
            CannotCarry: the format cannot say this; with what and where.
        """
        from jinja2 import StrictUndefined
        from jinja2.sandbox import SandboxedEnvironment

        environment = SandboxedEnvironment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        )
        environment.filters |= {"quoted": _quoted, "path": _path}
        text = environment.from_string(resource("templates/Modelfile.j2").read_text(encoding="utf-8")).render(
            gguf=self.gguf,
            adapter=self.adapter,
            template=self.template,
            system=self.system,
            parameters=self._parameters(),
            messages=self.messages,
            licenses=self.licenses,
            requires=self.requires,
        )
        meant, problem = list(self.instructions()), "it would be read as something else"
        try:
            told = read_modelfile(text)
        except ValueError as error:
            told, problem = [], str(error)
        if told != meant:
            lost = [f"{name.upper()} holds {' and '.join(found)}" for name, text in meant if (found := _troubles(text))]
            raise CannotCarry(f"no Modelfile can carry this model: {'; '.join(lost) or problem}")
        return text


def _quoted(text: str) -> str:
    return f"{_QUOTES}{text}{_QUOTES}"


def _path(text: str) -> str:
    return text if re.fullmatch(r"[\w./+-]+", text, re.ASCII) else _quoted(text)


def _troubles(text: str) -> list[str]:
    """What of a text the format loses."""
    lost = sorted({character for character in text if not _kept(character)})
    troubles = []
    if lost:
        names = [f"U+{ord(c):04X} {unicodedata.name(c, '')}".strip() for c in lost[:5]]
        troubles.append(f"characters that its parser drops ({', '.join(names)}{', ...' * (len(lost) > 5)})")
    if any(line.rstrip().endswith(_QUOTES) for line in text.splitlines()[:-1]) or text.startswith("\ufeff"):
        troubles.append('three quotes (""") at the end of a line, which end the text')
    return troubles


def _kept(character: str) -> bool:
    """Whether Ollama's parser keeps a character inside a text: spaces, tabs, line ends, and what Go calls printable."""
    if character in " \t\r\n":
        return True
    return unicodedata.category(character)[0] in "LMNPS"


def read_modelfile(text: str) -> list[Instruction]:
    """Read a Modelfile as Ollama does (its parser/parser.go): (command, argument) pairs, in order.

    A PARAMETER's command is its name, a MESSAGE's argument "role: text".

    Raises:
        ValueError: Ollama would refuse it.
    """
    instructions: list[Instruction] = []
    position, length = 0, len(text)

    def word() -> str:
        """Letters, digits and underscores up to a space or a tab."""
        nonlocal position
        match = re.compile(r"([A-Za-z0-9_]*)[ \t]").match(text, position)
        if match is None:
            raise ValueError(f"not an instruction: {text[position : position + 40]!r}")
        position = match.end()
        return match[1]

    while position < length:
        if text[position] in " \t\r\n":
            position += 1
            continue
        if text[position] == "#":
            position = _line_end(text, position)
            continue
        command = word().lower()
        if command not in _COMMANDS:
            raise ValueError(f"not an instruction: {command!r}")
        role = ""
        if command == "parameter":
            command = word()
        elif command == "message":
            role = word()
            if role not in ROLES:
                raise ValueError(f"not a role: {role!r}")
        argument, position = _argument(text, position)
        instructions.append((command, f"{role}: {argument}" if role else argument))
    if not any(command == "from" for command, _ in instructions):
        raise ValueError("no FROM line")
    return instructions


def _line_end(text: str, position: int) -> int:
    match = re.compile(r"[\r\n]").search(text, position)
    return match.start() if match else len(text)


def _argument(text: str, position: int) -> tuple[str, int]:
    """An argument reaches to the first line end at which it is not an open quotation."""
    start = position
    while True:
        position = _line_end(text, position)
        kept = "".join(filter(_kept, text[start:position])).strip()
        argument = _unquoted(kept)
        if argument is not None:
            return argument, position
        if position == len(text):
            raise ValueError("a quotation is not closed")
        position += 1


def _unquoted(text: str) -> str | None:
    for quotes in (_QUOTES, '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text


def write(model: ServedModel, modelfile: Path, request: Path) -> str:
    """Write a model's Modelfile, where it can carry everything, and what is sent instead, which can.

    Args:
        model: what is to be served.
        modelfile, request: where to; `run.layout` has their names in a run.

    Returns:
        Why there is no Modelfile; "" if there is one.
    """
    plan = {"gguf": model.gguf, "adapter": model.adapter, "request": model.body()}
    text = json.dumps(plan, ensure_ascii=True, indent=2)
    request.write_text(text + "\n", encoding="utf-8")
    try:
        modelfile.write_bytes(model.modelfile().encode("utf-8"))
    except CannotCarry as error:
        return str(error)
    return ""

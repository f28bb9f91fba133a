"""[[trainings]]: several adapters on one base, out of one configuration.

    [model]
    base = "smollm2-135m-instruct"

    [[trainings]]
    name = "sql"
    data.train = "sql.jsonl"

    [[trainings]]
    name = "tone"
    data.train = "tone.jsonl"
    lora.r = 8

Each is the rest of the file with its own keys in place of those there, and a run of its own, in run/sql and run/tone:
no stage knows of the others. [[adapters]] that name a training in the place of a path are one more, run/combined.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

COMBINED = "combined"
# What none has of its own: they share one base, and a folder with a run of each in it; adapters are of the combination.
_SHARED = ("model", "run", "adapter", "adapters", "trainings")
NOT_OF_THE_COMBINATION = ("data.train", "data.sources", "train.from_adapter", "train.early_stopping")
_HEADER = re.compile(r"\s*\[\[\s*trainings\s*\]\]")


def names_of(values: dict[str, Any], text: str, path: Path) -> tuple[str, ...]:
    """The names of a configuration's trainings, and of what they are combined to; none where it has none.

    Args:
        values: the file's, as TOML gives them.
        text: the file's.
        path: the file, for messages.

    Raises:
        UserError: a training has no name, or one that is taken, or a key that all of them share.
    """
    tables = values.get("trainings", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path}: trainings: each is a table: write [[trainings]] and its keys below it")
    names: list[str] = []
    for table, line in zip(tables, _headers(text, len(tables)), strict=True):
        where, name = f"{path}:{line}: trainings", table.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,60}", name):
            raise UserError(f'{where}: name = {name!r}: each has a name, which a folder can have, e.g. name = "sql"')
        if name.lower() in (COMBINED, *(other.lower() for other in names)):
            raise UserError(f"{where}: name = {name!r}: is taken: give it another")
        if shared := next((key for key in _SHARED if key in table), None):
            raise UserError(f"{where}: {name}: {shared} is the same for all trainings: write it outside of them")
        names.append(name)
    bits = {_bits(table) for table in tables}
    if len(bits) > 1 and values.get("adapters"):
        raise UserError(
            f"{path}: trainings: what is combined was trained on one base: write train.load_in_4bit outside of them"
        )
    for adapter in values.get("adapters", []) if isinstance(values.get("adapters"), list) else ():
        named = adapter.get("training") if isinstance(adapter, dict) else None
        if named is None or ("path" in adapter and not names):  # so `pipeline config` prints a combination
            continue
        if "path" in adapter:
            raise UserError(f"{path}: adapters: path and training exclude each other: keep one")
        if named not in names:
            known = f"there are {', '.join(names)}" if names else "there are no [[trainings]]"
            raise UserError(f"{path}: adapters: training = {named!r}: there is none of this name; {known}")
    return (*names, *((COMBINED,) if names and values.get("adapters") else ()))


def _bits(table: dict[str, Any]) -> Any:
    of_train = table.get("train")
    return of_train.get("load_in_4bit") if isinstance(of_train, dict) else None


def take(values: dict[str, Any], text: str, name: str) -> tuple[dict[str, Any], str]:
    """Leave in a configuration's values only what counts for one of its trainings, or for their combination.

    Returns:
        The training's own values, which go before the others; the file's text, of which only their lines are left.
    """
    tables = values.pop("trainings", [])
    if name == COMBINED:
        for section, key in (dotted.split(".") for dotted in NOT_OF_THE_COMBINATION):
            if isinstance(values.get(section), dict):
                values[section].pop(key, None)
        bits = _bits(tables[0])
        return {} if bits is None else {"train": {"load_in_4bit": bits}}, ""
    place = [table["name"] for table in tables].index(name)
    for key in ("adapter", "adapters"):
        values.pop(key, None)
    own = {key: value for key, value in tables[place].items() if key != "name"}
    first, *others = _headers(text, len(tables))[place:]
    lines = text.splitlines()[first : others[0] - 1 if others else None]
    written = []
    for line in lines:
        if (header := re.match(r"\s*\[\[?\s*([^\[\]]+)", line)) and not header[1].startswith("trainings."):
            break
        written.append(re.sub(r"^(\s*\[\[?\s*)trainings\.", r"\1", line))
    return own, "\n" * first + "\n".join(written)


def place_before(own: dict[str, Any], values: dict[str, Any]) -> None:
    """Put a training's own values in the place of those for all; of a table only the keys that it has."""
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            place_before(value, values[key])
        else:
            values[key] = value


def _headers(text: str, count: int) -> list[int]:
    """The lines, from 1, on which each of so many trainings begins; the first one where they stand in one list."""
    found = [number for number, line in enumerate(text.splitlines(), 1) if _HEADER.match(line)]
    return found if len(found) == count else [1] * count

"""What a stage sees of the configuration: the settings that it declared, and an error where it reads another.

A stage whose result depends on a setting that its declaration does not name would be taken for fresh when that setting
changes. So it cannot read one:

    view = View(config, ("train.seed",), "data")
    view.train.seed     # 3407
    view.train.batch    # UndeclaredSetting: the stage data reads train.batch, which its declaration does not name
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

Names = tuple[str, ...]


class UndeclaredSetting(RuntimeError):
    """A fault of the program: a stage read a setting that its declaration does not name."""


def covers(keys: Iterable[str], key: str) -> bool:
    """Whether a dotted key is among these keys, or in one of the sections among them."""
    return any(key == known or key.startswith(f"{known}.") for known in keys)


class View:
    """A configuration, or a section of one, of which only some keys can be read.

    Args:
        model: the configuration or the section.
        allowed: dotted keys and sections, from the whole configuration's root.
        stage: who reads, for the message.
        key: the section's own dotted key; "" for the whole configuration.
    """

    __slots__ = ("_allowed", "_key", "_model", "_stage")

    def __init__(self, model: BaseModel | View, allowed: Iterable[str], stage: str, key: str = "") -> None:
        self._model: BaseModel = model._model if isinstance(model, View) else model
        self._allowed, self._stage, self._key = tuple(allowed), stage, key

    def __getattr__(self, name: str) -> Any:
        if name not in type(self._model).model_fields:
            member = inspect.getattr_static(type(self._model), name)
            if isinstance(member, property) and member.fget is not None:
                return member.fget(self)  # it may read what the view shows
            raise AttributeError(f"{name} is no setting; a stage reads its settings by their names")
        key = type(self._model).model_fields[name].alias or name
        key = f"{self._key}.{key}" if self._key else key
        value = getattr(self._model, name)
        if isinstance(value, BaseModel):
            return View(value, self._allowed, self._stage, key)
        if isinstance(value, dict) and not covers(self._allowed, key):
            return _Table(value, self._allowed, self._stage, key)
        _check(self._allowed, self._stage, key)
        return value

    def model_copy(self, *, update: Mapping[str, Any]) -> View:
        """The same view of a configuration with some values replaced, as pydantic's `model_copy` makes it."""
        plain = {name: value._model if isinstance(value, View) else value for name, value in update.items()}
        return View(self._model.model_copy(update=plain), self._allowed, self._stage, self._key)

    def __repr__(self) -> str:
        return f"<what the stage {self._stage} sees of {self._key or 'the configuration'}>"


class _Table(Mapping[str, Any]):
    """A setting that is a table, of which only some entries can be read."""

    def __init__(self, table: dict[str, Any], allowed: Names, stage: str, key: str) -> None:
        self._table, self._allowed, self._stage, self._key = table, allowed, stage, key

    def __getitem__(self, entry: str) -> Any:
        _check(self._allowed, self._stage, f"{self._key}.{entry}")
        return self._table[entry]

    def __iter__(self) -> Iterator[str]:
        _check(self._allowed, self._stage, self._key)
        return iter(self._table)

    def __len__(self) -> int:
        _check(self._allowed, self._stage, self._key)
        return len(self._table)


def _check(allowed: Names, stage: str, key: str) -> None:
    if not covers(allowed, key):
        raise UndeclaredSetting(f"the stage {stage} reads {key}, which its declaration does not name")

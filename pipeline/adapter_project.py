"""A configuration for an adapter that somebody trained elsewhere, for those who come with nothing but its folder.

`pipeline export --adapter DIR` writes it into a folder of its own, so that every other command takes that folder:

    pipeline export --adapter their/adapter --quant q8_0
    pipeline chat adapter-export
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.model.adapter import base_of, read_given_adapter
from pipeline.resources import expanded
from pipeline.run.folder import write_whole

_MARK = "# Written by `pipeline export --adapter`, which replaces it. Every other command takes this folder.\n"


def write_project(
    adapter: Path,
    base: str | None,
    template: str | None,
    data: Path | None,
    quant: Sequence[str],
    form: str | None = None,
) -> Path:
    """Write the configuration into a folder in the current one.

    Args:
        adapter: its folder.
        base: the base; without it the one that the adapter names.
        template: the chat template that it was trained with.
        data: test questions.
        quant: quantization types; none for the default.
        form: "merged" or "adapter", as export.as; None for the default.

    Returns:
        The pipeline.toml.

    Raises:
        UserError: the folder is no adapter that can be merged, or a pipeline.toml of somebody's own is in the way.
    """
    adapter = expanded(adapter, "--adapter").resolve()
    base = base or base_of(read_given_adapter(adapter))
    name, path = _name(adapter), project_of(adapter)
    if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        raise UserError(
            f"{path}: is there already, and was not written by this command: move it away, or work elsewhere"
        )
    sections: dict[str, dict[str, Any]] = {
        "model": {"base": _in_full(base), "chat_template": template and _in_full(template)},
        "adapter": {"path": str(adapter)},
        "data": {"test": data and str(expanded(data, "--data").absolute())},
        "export": {"quant": list(quant), "as": form},
        "ollama": {"name": name},
    }
    lines = [_MARK]
    for section, values in sections.items():
        given = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items() if value]
        lines += [f"\n[{section}]\n", *given] if given else []
    path.parent.mkdir(exist_ok=True)
    write_whole(path, "".join(lines))
    return path


def project_of(adapter: Path) -> Path:
    """Where the configuration of an adapter's folder is written."""
    return Path.cwd() / f"{_name(adapter.resolve())}-export" / "pipeline.toml"


def _name(adapter: Path) -> str:
    name = f"{adapter.parent.name}-{adapter.name}" if adapter.name.startswith("checkpoint-") else adapter.name
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "adapter"


def _in_full(given: str) -> str:
    """A path that was given from where the command was typed; a hub id or a name stays."""
    path = expanded(given, "--base")
    return str(path.resolve()) if path.exists() else given

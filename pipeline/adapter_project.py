"""A configuration for an adapter that somebody trained elsewhere, for those who come with nothing but its folder.

`pipeline export --adapter DIR` writes it into a folder of its own, so that every other command takes that folder:

    pipeline export --adapter their/adapter --quant q8_0
    pipeline chat adapter-export
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.model.adapter_folder import base_of, read_given_adapter
from pipeline.model.base import is_on_hub, resolve_base
from pipeline.model.mlx_adapter import is_of_mlx, write_as_peft
from pipeline.resources import expanded, without_links
from pipeline.run.folder import write_whole
from pipeline.toml_file import as_toml

_MARK = "# Written by `pipeline export --adapter`, which replaces it. Every other command takes this folder.\n"


def write_project(
    adapters: Sequence[Path],
    base: str | None,
    template: str | None,
    data: Sequence[Path],
    quant: Sequence[str],
    form: str | None = None,
    *,
    weights: Sequence[float] = (),
    combine: str | None = None,
    density: float | None = None,
) -> Path:
    """Write the configuration into a folder in the current one.

    Args:
        adapters: their folders; several are combined.
        base: the base; without it the one that the first names.
        template: the chat template that they were trained with.
        data: test questions: none, a file for all, or one for each of several, in their order.
        quant: quantization types; none for the default.
        form: "merged" or "adapter", as export.as; None for the default.
        weights: what each of several counts, in their order; none for 1 each.
        combine, density: as in [adapter]; None for the default.

    Returns:
        The pipeline.toml.

    Raises:
        UserError: a folder is no adapter that can be merged, or a pipeline.toml of somebody's own is in the way.
    """
    folders = [without_links(expanded(adapter, "--adapter")) for adapter in adapters]
    found = [None if is_of_mlx(folder) else read_given_adapter(folder) for folder in folders]
    if not base:
        if found[0] is None:
            raise UserError(f"{folders[0]}: is an adapter of MLX: give its base as MLX found it, in 16 bits (--base)")
        base = base_of(found[0])
    if not is_on_hub(base):
        resolve_base(base)
    if weights and len(weights) != len(folders):
        raise UserError(f"--weight: {len(weights)} of them for {len(folders)} --adapter: give one for each, or none")
    if len(data) > 1 and len(data) != len(folders):
        raise UserError(f"--data: {len(data)} of them for {len(folders)} --adapter: give one for all, or one for each")
    tests = [str(expanded(file, "--data").absolute()) for file in data]
    several = len(folders) > 1 or bool(weights)
    name, path = _name(*folders), project_of(*folders)
    if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        raise UserError(
            f"{path}: is there already, and was not written by this command: move it away, or work elsewhere"
        )
    for place, folder in enumerate(folders):
        if found[place] is None:
            folders[place] = path.parent / f"{folder.name}-peft"
            write_as_peft(folder, folders[place])
    sections: dict[str, dict[str, Any]] = {
        "model": {"base": _in_full(base), "chat_template": template and _in_full(template)},
        "adapter": {"path": None if several else str(folders[0]), "combine": combine, "density": density},
        "data": {"test": tests[0] if len(tests) == 1 else None},
        "export": {"quant": list(quant), "as": form},
        "ollama": {"name": name},
    }
    lines = [_MARK]
    for section, values in sections.items():
        given = [f"{key} = {as_toml(value)}\n" for key, value in values.items() if value]
        lines += [f"\n[{section}]\n", *given] if given else []
    for place, folder in enumerate(folders) if several else ():
        table = {"path": str(folder), "weight": weights[place] if weights else 1.0}
        table |= {"test": tests[place]} if len(tests) > 1 else {}
        given = [f"{key} = {as_toml(value)}\n" for key, value in table.items()]
        lines += ["\n[[adapters]]\n", *given]
    path.parent.mkdir(exist_ok=True)
    write_whole(path, "".join(lines))
    return path


def project_of(*adapters: Path) -> Path:
    """Where the configuration of an adapter's folder, or of several, is written."""
    return Path.cwd() / f"{_name(*map(without_links, adapters))}-export" / "pipeline.toml"


def _name(*adapters: Path) -> str:
    names = (f"{a.parent.name}-{a.name}" if a.name.startswith("checkpoint-") else a.name for a in adapters)
    name = "-".join(names)[:80]
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "adapter"


def _in_full(given: str) -> str:
    """A path that was given from where the command was typed; a hub id or a name stays."""
    path = expanded(given, "--base")
    return str(path.resolve()) if path.exists() else given

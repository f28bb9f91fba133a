"""What is known of the training of a chain's adapter: its run, or those of the adapters that were combined.

An adapter that is given lies in the folder of the run that trained it, or elsewhere. Where that run still has the rows
and the batches that the adapter was made of, they are judged as those of one's own training are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.run.folder import read_manifest, unchanged
from pipeline.run.layout import Layout
from pipeline.verify.artefacts import Artefacts


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        layout: the run's folder, with the rows and the batches.
        adapter: the adapter's folder, with the tokenizer that was trained.
        config: what the run was made with; None where that is not known.
    """

    layout: Layout
    adapter: Path
    config: Config | None


def trainings_of(artefacts: Artefacts) -> list[Training] | str:
    """The trainings that a chain's adapter comes from, or why they are not known."""
    if artefacts.run is None or artefacts.adapter is None:
        if not artefacts.given:
            return "this export has no record of its training"
    elif not artefacts.given:
        own = Layout(artefacts.run)
        known = own.batches.is_file()
        return [Training(own, artefacts.adapter, artefacts.config)] if known else f"{own.batches} is missing"
    found = []
    for folder in artefacts.given:
        layout = Layout.of_adapter(folder)
        if layout is None or not layout.batches.is_file():
            return f"{folder} was trained elsewhere: the rows that it was trained on are not known here"
        config = _made_with(layout)
        if reason := _other_since(layout) if config else "another version of this program wrote in it":
            return f"{layout.run}: {reason} since {folder} was trained: the rows that it was trained on are not known"
        found.append(Training(layout, folder, config))
    return found


def training_files(config: Config) -> list[Path]:
    """The rows and batches of the runs that trained the adapters of a configuration, as far as they are there."""
    layouts = [layout for folder in config.given_adapters if (layout := Layout.of_adapter(folder)) is not None]
    return [path for layout in layouts for path in (layout.rows("train"), layout.batches) if path.is_file()]


def _made_with(layout: Layout) -> Config | None:
    """A run's configuration; None where this version cannot read it."""
    try:
        return Config.model_validate_json(layout.config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _other_since(layout: Layout) -> str | None:
    """What of a run is no longer what its adapter was made of, or None."""
    try:
        stages: dict[str, Any] = read_manifest(layout.run)["stages"]
    except PipelineError:
        return "its record was lost"
    if not {"data", "train"} <= set(stages):
        return "its record was lost"
    data, train = stages["data"]["outputs"], stages["train"]
    if any(data.get(name, {}).get("sha256", digest) != digest for name, digest in train["inputs"].items()):
        return "its data was made anew"
    return unchanged(layout.run, data | train["outputs"])

"""What a node's result was made from, and what of it has changed since.

It is what can change the result: the code that runs, the versions of the libraries and the programs that the stage
declares, the settings that it reads, and the files; what these are stands in `STAGE` at the end of the stage's file.
The same basis is the same fingerprint. A node is stale, and runs again, where its basis has changed, where an output is
not what was recorded, or where a node that it needs is stale (`pipeline.run.graph` goes through them).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.run.code import code_of
from pipeline.run.provenance import installed_version, wherever
from pipeline.run.stage import Stage
from pipeline.run.view import covers

_BASES = ("model.base", "merge.model")  # their files are inputs


@dataclass(frozen=True)
class Basis:
    """What one node is made from.

    Attributes:
        node: its name.
        settings: the values that it reads, by dotted key.
        code: the digests of the modules that it runs, by name.
        versions: those of its libraries and programs; None for one that is not installed.
        inputs: the SHA-256 of every file that it reads, by its name in the run or its path.
    """

    node: str
    settings: dict[str, Any]
    code: dict[str, str]
    versions: dict[str, str | None]
    inputs: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all of it. A file from outside the run counts by its content and its turn, wherever it lies."""
        parts = asdict(self) | {"inputs": [sorted(_of_run(self.inputs)), _from_outside(self.inputs)]}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """What the manifest keeps of it."""
        return {name: value for name, value in asdict(self).items() if name != "node"} | {
            "fingerprint": self.fingerprint
        }

    def changed_since(self, recorded: dict[str, Any]) -> str | None:
        """The first thing that is no longer as it was recorded, in words; None when nothing has changed."""
        if recorded["fingerprint"] == self.fingerprint:
            return None
        before = recorded["settings"]
        for key, value in self.settings.items():
            if key in before and before[key] != value:
                return f"{key} has changed"
        known, outside = _of_run(recorded["inputs"]), _from_outside(recorded["inputs"])
        for name, digest in self.inputs.items():
            if f"{name} {digest}" not in known and digest not in outside:
                return f"{Path(name).name} has changed"
        if _from_outside(self.inputs) != outside:
            return "other files, or the same in another order"
        was = recorded.get("versions", {})
        for name, now in self.versions.items():
            if name in was and now != was[name]:
                return f"{name} is {now or 'not installed'}, was {was[name] or 'not installed'}"
        code = recorded.get("code", {})
        changed = [name for name in sorted(code.keys() | self.code.keys()) if code.get(name) != self.code.get(name)]
        if code and changed:
            more = f" and of {len(changed) - 1} more modules" if len(changed) > 1 else ""
            return f"the code of {changed[0]}{more} has changed"
        return "it was made by another version of this program"


def _of_run(inputs: dict[str, str]) -> list[str]:
    """What the run's own files count by: their names in it, and what they hold."""
    return [f"{name} {digest}" for name, digest in inputs.items() if not Path(name).is_absolute()]


def _from_outside(inputs: dict[str, str]) -> list[str]:
    """What other files count by, in the order in which a stage names them: training data are no test data."""
    return [digest for name, digest in inputs.items() if Path(name).is_absolute()]


def settings_of(stage: Stage, variant: str, config: Config) -> dict[str, Any]:
    """The settings that a node depends on, as JSON values by dotted key.

    Raises:
        KeyError: the stage declares one that there is not.
    """
    leaves: dict[str, Any] = {}
    for section, table in config.model_dump(mode="json").items():
        leaves |= (
            {f"{section}.{key}": value for key, value in table.items()} if isinstance(table, dict) else {section: table}
        )
    for key in _BASES:
        leaves[key] = wherever(leaves[key])
    declared = stage.settings_of(variant)
    for key in (*declared, *stage.indifferent_to):
        table, _, entry = key.rpartition(".")
        if isinstance(leaves.get(table), dict):
            leaves[key] = leaves[table].get(entry)
        elif not any(covers((key,), leaf) for leaf in leaves):
            raise KeyError(f"the stage {stage.name} declares {key}, which is no setting")
    return {
        leaf: value
        for leaf, value in leaves.items()
        if covers(declared, leaf) and not covers(stage.indifferent_to, leaf)
    }


def basis_of(stage: Stage, variant: str, config: Config, inputs: dict[str, str]) -> Basis:
    """What a node would be made from now; `inputs` are the files that it reads."""
    return Basis(
        node=f"{stage.name}/{variant}" if variant else stage.name,
        settings=settings_of(stage, variant, config),
        code=code_of(stage.run.__module__),
        versions=_installed(stage.libraries) | _pinned(stage.programs),
        inputs=inputs,
    )


def _installed(libraries: tuple[str, ...]) -> dict[str, str | None]:
    """Their versions: builds of one version for a CPU and for a GPU ("2.14.1+cu130") are one version."""
    found = {name: installed_version(name) for name in libraries}
    return {name: now and now.partition("+")[0] for name, now in found.items()}


def _pinned(programs: tuple[str, ...]) -> dict[str, str | None]:
    from pipeline.setup.pins import pins

    known = pins() if programs else {}
    return {name: str(known[name]["version"]) for name in programs}

"""The stages in order: which of them are stale and why, and the running of those that are.

A node is a stage, or one variant of a stage ("quantize/q4_k_m"). It is fresh when the fingerprint over all that it
depends on (its part of the configuration, its code, the files it reads) is the recorded one and its outputs are still
what was recorded. A node runs in a process of its own, writes to a hidden folder, and appears by a rename.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline import console
from pipeline.config import Config
from pipeline.errors import PipelineError, UserError
from pipeline.run.folder import (
    hash_outside,
    locked,
    read_manifest,
    record_files,
    unchanged,
    write_manifest,
    write_whole,
)
from pipeline.run.stage import append_event

STAGES = (
    "preflight", "data", "train", "merge", "convert", "quantize", "modelfile", "deploy", "evaluate", "verify", "report",
)  # fmt: skip
# What has no effect on a stage's outputs, however much of it the stage imports.
_NO_PART_OF_THE_CODE = {
    "pipeline.config",
    "pipeline.console",
    "pipeline.errors",
    "pipeline.run.folder",
    "pipeline.run.stage",
}
PARTIAL = ".partial"
_NOTHING = 2**20  # bytes: with so few, a stage could not even say what is wrong
PARENT = "PIPELINE_PARENT"  # tells a stage's process whose it is


@dataclass(frozen=True)
class Node:
    """One step of a run."""

    stage: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.stage}/{self.variant}" if self.variant else self.stage


@dataclass(frozen=True)
class State:
    """What is known of a node: `reason` is None when it is fresh, else why it has to run."""

    node: Node
    reason: str | None
    fingerprint: str | None
    inputs: dict[str, str]


def stage_module(stage: str) -> ModuleType:
    """The module of a stage; its docstring says what it does."""
    return importlib.import_module(f"pipeline.stages.{stage}")


def nodes(config: Config) -> list[Node]:
    """Every node of a run, in an order in which they can run."""
    return [node for stage in STAGES for node in nodes_of(stage, config)]


def nodes_of(stage: str, config: Config) -> list[Node]:
    """The nodes of one stage."""
    module = stage_module(stage)
    names = module.variants(config) if hasattr(module, "variants") else ("",)
    return [Node(stage, name) for name in names]


def needs(node: Node, config: Config) -> list[Node]:
    """The nodes whose outputs this one reads."""
    needed = stage_module(node.stage).NEEDS
    names = needed(node.variant) if callable(needed) else needed
    return [
        other
        for name in names
        for other in nodes_of(name.partition("/")[0], config)
        if other != node and name in (str(other), other.stage)
    ]


def with_needs(targets: Iterable[Node], config: Config) -> list[Node]:
    """The targets and all that they depend on, in order."""
    wanted: set[Node] = set()
    queue = list(targets)
    while queue:
        if (node := queue.pop()) not in wanted:
            wanted.add(node)
            queue.extend(needs(node, config))
    order = {stage: place for place, stage in enumerate(STAGES)}
    return sorted(wanted, key=lambda node: (order[node.stage], nodes_of(node.stage, config).index(node)))


def examine(config: Config, manifest: dict[str, Any], targets: Sequence[Node]) -> list[State]:
    """Say of each node whether it has to run, from the manifest and the files as they are now."""
    stale: set[Node] = set()
    states = []
    for node in targets:
        if str(node) in manifest["stages"] or any(needed in stale for needed in needs(node, config)):
            try:
                state = _examine(node, config, manifest, stale)
            except PipelineError as error:  # an input is gone, which is no reason to say nothing of the others
                state = State(node, str(error), None, {})
        else:  # there is nothing to compare, and a look at its inputs could fetch a base from its hub
            state = State(node, "has not run", None, {})
        if state.reason is not None:
            stale.add(node)
        states.append(state)
    return states


def _examine(node: Node, config: Config, manifest: dict[str, Any], stale: set[Node]) -> State:
    waiting = [str(needed) for needed in needs(node, config) if needed in stale]
    if waiting:
        return State(node, f"{waiting[0]} runs before it", None, {})
    inputs = _inputs(node, config, manifest)
    fingerprint = _fingerprint(node, config, inputs)
    recorded = manifest["stages"].get(str(node))
    if recorded is None:
        reason: str | None = "has not run"
    elif recorded["fingerprint"] != fingerprint:
        reason = _what_changed(recorded, node, config, inputs)
    else:
        reason = unchanged(config.run_folder, recorded["outputs"]) or _unfinished(node, recorded)
    return State(node, reason, fingerprint, inputs)


def _unfinished(node: Node, recorded: dict[str, Any]) -> str | None:
    """What a stage could not do, and tries again every time."""
    module = stage_module(node.stage)
    reason: str | None = module.unfinished(recorded["figures"]) if hasattr(module, "unfinished") else None
    return reason


def _inputs(node: Node, config: Config, manifest: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of every file that the node reads: outputs of other nodes by their names in the run, others by path."""
    module = stage_module(node.stage)
    reads = getattr(module, "READS", {})  # where a stage reads only some files of another
    inputs = {
        name: record["sha256"]
        for needed in needs(node, config)
        for name, record in manifest["stages"][str(needed)]["outputs"].items()
        if needed.stage not in reads or Path(name).name in reads[needed.stage]
    }
    for path in module.inputs(config) if hasattr(module, "inputs") else ():
        inputs[str(path)] = hash_outside(path, manifest.setdefault("files", {}))
    return inputs


def _settings(node: Node, config: Config) -> dict[str, Any]:
    """The part of the configuration that the node depends on, as JSON values."""
    values = config.model_dump(mode="json")
    settings = {}
    for key in stage_module(node.stage).CONFIG:
        value = values
        for part in key.split("."):
            value = value[part]
        settings[key] = value
    return settings


def _fingerprint(node: Node, config: Config, inputs: dict[str, str]) -> str:
    parts = {
        "node": str(node),
        "settings": _settings(node, config),
        "code": code_digest(f"pipeline.stages.{node.stage}"),
        "inputs": sorted(inputs.values()),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _what_changed(recorded: dict[str, Any], node: Node, config: Config, inputs: dict[str, str]) -> str:
    settings = _settings(node, config)
    for key, value in settings.items():
        if (before := recorded["settings"].get(key)) != value:
            if isinstance(value, dict) and isinstance(before, dict):
                changed = [name for name in value if before.get(name) != value[name]]
                return f"{key}.{changed[0]} has changed" if changed else f"{key} has changed"
            return f"{key} has changed"
    for name, digest in inputs.items():
        if digest not in recorded["inputs"].values():  # the same file may lie elsewhere now
            return f"{Path(name).name} has changed"
    return "its code has changed"


@cache
def code_digest(module: str) -> str:
    """SHA-256 over the source of a module and of every module of this program that it imports."""
    sources: dict[str, bytes] = {}
    queue = [module]
    while queue:
        name = queue.pop()
        if name in sources or name in _NO_PART_OF_THE_CODE:
            continue
        path = _source(name)
        if path is None:
            continue
        sources[name] = path.read_bytes()
        for statement in ast.walk(ast.parse(sources[name])):
            if isinstance(statement, ast.ImportFrom) and statement.module and statement.level == 0:
                queue += [statement.module, *(f"{statement.module}.{alias.name}" for alias in statement.names)]
            elif isinstance(statement, ast.Import):
                queue += [alias.name for alias in statement.names]
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(name.encode() + b"\0" + sources[name] + b"\0")
    return digest.hexdigest()


def _source(name: str) -> Path | None:
    if name.split(".")[0] != "pipeline":
        return None
    base = Path(__file__).parents[1].joinpath(*name.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def run(config: Config, sources: dict[str, str], targets: Sequence[Node], *, force: bool = False) -> list[State]:
    """Bring the targets, and all that they need, up to date.

    Args:
        config: the resolved configuration.
        sources: where each value of it came from, for the manifest.
        targets: the nodes that are wanted.
        force: run the targets themselves even when they are fresh.

    Returns:
        What each node's state was when it was looked at.

    Raises:
        UserError: a mistake that a stage found in what the user gave.
        PipelineError: a stage failed; everything before it is kept.
    """
    folder = config.run_folder
    with locked(folder):
        from pipeline.run.provenance import provenance

        manifest = read_manifest(folder)
        wanted = with_needs(targets, config)
        _refuse_unrecorded(wanted, manifest, folder)
        manifest["config"] = {"values": config.model_dump(mode="json"), "sources": sources}
        made_with = provenance()
        manifest |= made_with | {"nodes": [str(node) for node in nodes(config)]}
        write_whole(folder / "config.json", config.model_dump_json(indent=1) + "\n")
        states = []
        skipped = 0
        for node in wanted:
            state = _examine(node, config, manifest, stale=set())
            if force and node in targets:
                state = State(node, "it was asked for", state.fingerprint, state.inputs)
            states.append(state)
            if state.reason is None:
                skipped += 1
                continue
            console.say(f"{node}: {state.reason}" if state.reason != "has not run" else f"{node}")
            _run_node(state, config, manifest, made_with)
        write_manifest(folder, manifest)
        if skipped:
            console.say(f"{skipped} of {len(wanted)} stages are up to date and were skipped")
    return states


def _run_node(state: State, config: Config, manifest: dict[str, Any], made_with: dict[str, Any]) -> None:
    node, folder = state.node, config.run_folder
    name = str(node).replace("/", "__")
    work = folder / PARTIAL / name
    # An interrupted stage goes on where it was, unless what it depends on has changed since.
    if not (work / "fingerprint").is_file() or (work / "fingerprint").read_text() != state.fingerprint:
        shutil.rmtree(work, ignore_errors=True)
    (work / "scratch").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "output", ignore_errors=True)
    (work / "output").mkdir()
    (work / "fingerprint").write_text(str(state.fingerprint))
    (work / "result.json").unlink(missing_ok=True)
    (folder / "logs").mkdir(exist_ok=True)

    append_event(folder, "start", stage=str(node), reason=state.reason)
    started = time.time()
    status, usage = _worker(folder, node)
    seconds = time.time() - started
    result = _result(work / "result.json", status, node, folder)
    if "error" in result:
        append_event(folder, "failed", stage=str(node), message=result["error"])
        raise (UserError if status == UserError.exit_status else PipelineError)(result["error"])

    _refuse_unrecorded([node], manifest, folder)
    final = folder / node.stage / node.variant
    outputs = record_files(work / "output", work / "output")
    manifest["stages"][str(node)] = {
        "fingerprint": state.fingerprint,
        "settings": _settings(node, config),
        "inputs": state.inputs,
        "outputs": {str(final.relative_to(folder) / name): record for name, record in outputs.items()},
        "figures": result["figures"],
        "warnings": result["warnings"],
        "commands": result["commands"],
        "started": round(started, 3),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "made_with": made_with,
    }
    # First the record: after a crash in between its files are missing or others, so the node runs again.
    write_manifest(folder, manifest)
    _publish(work / "output", final)
    shutil.rmtree(work, ignore_errors=True)
    append_event(folder, "done", stage=str(node), seconds=round(seconds, 3))
    console.say(f"  done in {seconds:.1f} s")


def _worker(folder: Path, node: Node) -> tuple[int, Any]:
    """Run one node in a process of its own; return its wait status and resource usage."""
    # Libraries count their users on the hub unless told not to.
    environment = {"HF_HUB_DISABLE_TELEMETRY": "1", **os.environ, "PYTHONHASHSEED": "0", PARENT: str(os.getpid())}
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.run.worker", str(folder), node.stage, node.variant], env=environment
    )
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        # The terminal has sent the signal to the stage as well: let it end, then end.
        try:
            os.wait4(process.pid, 0)
        finally:
            process.returncode = 0
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage


def _result(path: Path, status: int, node: Node, folder: Path) -> dict[str, Any]:
    if path.is_file():
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result
    log = folder / "logs" / f"{str(node).replace('/', '__')}.log"
    if shutil.disk_usage(folder).free < _NOTHING:
        return {"error": f"{node}: no space left on the disk of {folder}; free some and give the same command again"}
    if status == -signal.SIGKILL:
        cause = "was killed, as a machine does that is out of memory; try a smaller train.batch or train.max_length"
    elif status < 0:
        cause = f"was ended by signal {signal.Signals(-status).name}"
    else:
        cause = f"ended with status {status}"
    return {"error": f"{node}: {cause}; its log is {log}. The same command continues here."}


def _refuse_unrecorded(targets: Sequence[Node], manifest: dict[str, Any], folder: Path) -> None:
    """What is in the place of a node's outputs and is not recorded is somebody's own."""
    foreign = []
    for node in targets:
        final = folder / node.stage / node.variant
        if str(node) in manifest["stages"] or not final.exists():
            continue
        # `pipeline verify RUN` leaves its result where the stage would, without a record.
        if final.is_file() or {path.name for path in final.iterdir()} - {"verify.json"}:
            foreign.append(str(final))
    if foreign:
        raise UserError(
            f"run.folder: {', '.join(foreign)}: not recorded as made by this run, which would replace it: move it "
            "away, or choose another folder"
        )


def _publish(output: Path, final: Path) -> None:
    """Put a finished folder in its place."""
    # Files of a variant lie below the stage's folder, so an old stage folder without variants must not stay there.
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        old = output.with_name("old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        output.rename(final)
        shutil.rmtree(old)
    else:
        output.rename(final)


def status(config: Config) -> list[dict[str, Any]]:
    """Every node of a run: its state, why, and what is recorded of it."""
    manifest = read_manifest(config.run_folder)
    rows = []
    for state in examine(config, manifest, nodes(config)):
        record = manifest["stages"].get(str(state.node), {})
        rows.append(
            {
                "stage": str(state.node),
                "state": "fresh" if state.reason is None else "stale" if record else "missing",
                "reason": state.reason,
                "seconds": record.get("seconds"),
                "peak_memory_bytes": record.get("peak_memory_bytes"),
                "figures": record.get("figures", {}),
                "warnings": record.get("warnings", []),
            }
        )
    return rows

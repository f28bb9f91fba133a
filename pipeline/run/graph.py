"""The stages in order: which of them are stale and why, and the running of those that are.

A node is a stage, or one variant of a stage ("quantize/q4_k_m"). It is fresh when all that it depends on is as it was,
and its outputs are still what was recorded: `pipeline.run.basis` says what counts, and each stage's own declaration,
`STAGE` in its file, what that is. A node runs in a process of its own, writes to a hidden folder, and appears by a
rename.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pipeline import console
from pipeline.config import Config
from pipeline.errors import PipelineError, UserError
from pipeline.run.basis import Basis, basis_of
from pipeline.run.folder import (
    hash_outside,
    locked,
    read_manifest,
    record_files,
    unchanged,
    without_removed,
    write_manifest,
    write_whole,
)
from pipeline.run.launcher import Launcher
from pipeline.run.layout import Layout
from pipeline.run.stage import EVERY_JUDGED_STAGE, Stage, append_event

_NOTHING = 2**20  # bytes: with so few, a stage could not even say what is wrong


@dataclass(frozen=True)
class Node:
    """One step of a run."""

    stage: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.stage}/{self.variant}" if self.variant else self.stage


@dataclass(frozen=True)
class State:
    """What is known of a node: `reason` is None when it is fresh, else why it has to run.

    `basis` is what it would be made from; None where that is not known yet.
    """

    node: Node
    reason: str | None
    basis: Basis | None = None


class Graph:
    """Stages in an order in which they can run.

    Args:
        stages: their declarations.
    """

    def __init__(self, stages: Iterable[Stage]) -> None:
        self.stages = {stage.name: stage for stage in stages}

    def nodes(self, config: Config) -> list[Node]:
        """Every node of a run, in an order in which they can run."""
        return [node for stage in self.stages for node in self.nodes_of(stage, config)]

    def nodes_of(self, stage: str, config: Config) -> list[Node]:
        """The nodes of one stage."""
        return [Node(stage, variant) for variant in self.stages[stage].variants(config)]

    def needs(self, node: Node, config: Config) -> list[Node]:
        """The nodes whose outputs this one reads."""
        return [
            other
            for name in self._names_of_needs(node)
            for other in self.nodes_of(name.partition("/")[0], config)
            if other != node and name in (str(other), other.stage)
        ]

    def _names_of_needs(self, node: Node) -> list[str]:
        names: list[str] = []
        for name in self.stages[node.stage].needs_of(node.variant):
            if name == EVERY_JUDGED_STAGE:
                order = list(self.stages)
                names += [other for other in order[: order.index(node.stage)] if self.stages[other].judged]
            else:
                names.append(name)
        return names

    def with_needs(self, targets: Iterable[Node], config: Config) -> list[Node]:
        """The targets and all that they depend on, in order."""
        wanted: set[Node] = set()
        queue = list(targets)
        while queue:
            if (node := queue.pop()) not in wanted:
                wanted.add(node)
                queue.extend(self.needs(node, config))
        return [node for node in self.nodes(config) if node in wanted]

    def examine(self, config: Config, manifest: dict[str, Any], targets: Sequence[Node]) -> list[State]:
        """Say of each node whether it has to run, from the manifest and the files as they are now."""
        stale: set[Node] = set()
        states = []
        for node in targets:
            if str(node) in manifest["stages"] or any(needed in stale for needed in self.needs(node, config)):
                try:
                    state = self._examine(node, config, manifest, stale)
                except PipelineError as error:  # an input is gone, which is no reason to say nothing of the others
                    state = State(node, str(error))
            else:  # there is nothing to compare, and a look at its inputs could fetch a base from its hub
                state = State(node, "has not run")
            if state.reason is not None:
                stale.add(node)
            states.append(state)
        return states

    def _examine(
        self, node: Node, config: Config, manifest: dict[str, Any], stale: set[Node], forced: Sequence[Node] = ()
    ) -> State:
        for needed in self.needs(node, config):
            if needed in stale or str(needed) not in manifest["stages"]:
                return State(node, f"{needed} runs before it")
        stage, basis = self.stages[node.stage], self.basis(node, config, manifest)
        recorded = manifest["stages"].get(str(node))
        if node in forced:
            return State(node, "it was asked for", basis)
        if recorded is None:
            return State(node, "has not run", basis)
        outputs, removers = recorded["outputs"], self._removers(node, config)
        there = without_removed(config.run_folder, outputs) if removers else outputs
        reason = basis.changed_since(recorded)
        reason = reason or unchanged(config.run_folder, there) or stage.unfinished(recorded["figures"])
        if reason is None and len(there) < len(outputs):
            again = (other for other in removers if self._examine(other, config, manifest, stale, forced).reason)
            reason = next((f"{other} runs again, for which it was removed" for other in again), None)
        return State(node, reason, basis)

    def _removers(self, node: Node, config: Config) -> list[Node]:
        """The nodes that remove some of a node's files when they are done."""
        return [other for other in self.nodes(config) if node.stage in self.stages[other.stage].removes(config)]

    def _remove(self, node: Node, config: Config, manifest: dict[str, Any]) -> None:
        """Remove what a node that is up to date has made superfluous."""
        patterns, run = self.stages[node.stage].removes(config), config.run_folder
        for needed in self.needs(node, config):
            outputs = manifest["stages"][str(needed)]["outputs"]
            names = [name for name in outputs if _matches(patterns.get(needed.stage, ()), needed, name)]
            if there := [name for name in names if (run / name).exists()]:
                for name in there:
                    outputs[name]["removed"] = True
                write_manifest(run, manifest)  # first: after a crash in between they are removed the next time
                for name in there:
                    (run / name).unlink()
                console.say(f"  removed {', '.join(there)}")

    def basis(self, node: Node, config: Config, manifest: dict[str, Any]) -> Basis:
        """What a node would be made from now: all that it needs must be recorded in the manifest."""
        stage = self.stages[node.stage]
        inputs = {
            name: record["sha256"]
            for needed in self.needs(node, config)
            for name, record in manifest["stages"][str(needed)]["outputs"].items()
            if _reads(stage, needed, name)
        }
        for path in stage.files(config, node.variant):
            inputs[str(path)] = hash_outside(path, manifest.setdefault("files", {}))
        return basis_of(stage, node.variant, config, inputs)

    def run(
        self,
        config: Config,
        sources: dict[str, str],
        targets: Sequence[Node],
        *,
        force: bool = False,
        launcher: Launcher | None = None,
    ) -> list[State]:
        """Bring the targets, and all that they need, up to date.

        Args:
            config: the resolved configuration.
            sources: where each value of it came from, for the manifest.
            targets: the nodes that are wanted.
            force: run the targets themselves even when they are fresh.
            launcher: starts the stages; None for one of their own.

        Returns:
            What each node's state was when it was looked at.

        Raises:
            UserError: a mistake that a stage found in what the user gave.
            PipelineError: a stage failed; everything before it is kept.
        """
        folder = config.run_folder
        with locked(folder):
            from pipeline.run.provenance import keep_first_machine, provenance

            manifest = read_manifest(folder)
            wanted = self.with_needs(targets, config)
            _refuse_unrecorded(wanted, manifest, folder)
            manifest["config"] = {"values": config.model_dump(mode="json"), "sources": sources}
            made_with = provenance(library for stage in self.stages.values() for library in stage.libraries)
            manifest |= made_with | {"nodes": [str(node) for node in self.nodes(config)]}
            keep_first_machine(manifest, config.model, made_with["machine"])
            write_whole(Layout(folder).config, config.model_dump_json(indent=1) + "\n")
            states = []
            skipped = 0
            with closing(Launcher()) if launcher is None else nullcontext(launcher) as starts:
                for node, following in itertools.zip_longest(wanted, wanted[1:]):
                    state = self._examine(node, config, manifest, set(), targets if force else ())
                    states.append(state)
                    if state.reason is None:
                        skipped += 1
                    else:
                        console.say(f"{node}: {state.reason}" if state.reason != "has not run" else f"{node}")
                        then = self.stages[following.stage] if following else None
                        _run_node(state, self.stages[node.stage], then, folder, manifest, made_with, starts)
                    self._remove(node, config, manifest)
            write_manifest(folder, manifest)
            if skipped:
                console.say(f"{skipped} of {len(wanted)} stages are up to date and were skipped")
        return states

    def status(self, config: Config) -> list[dict[str, Any]]:
        """Every node of a run: its state, why, and what is recorded of it."""
        manifest = read_manifest(config.run_folder)
        rows = []
        for state in self.examine(config, manifest, self.nodes(config)):
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


def _reads(stage: Stage, needed: Node, name: str) -> bool:
    """Whether a stage reads a file that another one left, by its path in the run."""
    return needed.stage not in stage.reads or _matches(stage.reads[needed.stage], needed, name)


def _matches(patterns: Sequence[str], node: Node, name: str) -> bool:
    """Whether patterns from a node's folder name one of its files, by that file's path in the run."""
    path = Path(name).relative_to(Path(node.stage, node.variant)).as_posix()
    matched = False
    for pattern in patterns:
        if fnmatchcase(path, pattern.removeprefix("!")):
            matched = not pattern.startswith("!")
    return matched


def _run_node(
    state: State,
    stage: Stage,
    then: Stage | None,
    folder: Path,
    manifest: dict[str, Any],
    made_with: dict[str, Any],
    launcher: Launcher,
) -> None:
    node, basis, layout = state.node, state.basis, Layout(folder)
    assert basis is not None
    work = layout.partial(node.stage, node.variant)
    # Where an interrupted stage can go on, it does, unless what it depends on has changed since.
    known = work / "fingerprint"
    if not (stage.goes_on and known.is_file() and known.read_text() == basis.fingerprint):
        shutil.rmtree(work, ignore_errors=True)
    (work / "scratch").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "output", ignore_errors=True)
    (work / "output").mkdir()
    known.write_text(basis.fingerprint)
    (work / "result.json").unlink(missing_ok=True)
    layout.log(node.stage).parent.mkdir(exist_ok=True)
    layout.log(node.stage, node.variant).write_bytes(b"")

    append_event(folder, "start", stage=str(node), reason=state.reason)
    started = time.time()
    ended = launcher.run(folder, stage, node.variant, then)
    seconds = time.time() - started
    result = _result(work / "result.json", ended.status, node, layout, stage.smaller)
    if "error" in result:
        append_event(folder, "failed", stage=str(node), message=result["error"])
        raise (UserError if ended.status == UserError.exit_status else PipelineError)(result["error"])

    _refuse_unrecorded([node], manifest, folder)
    final = layout.node(node.stage, node.variant)
    outputs = record_files(work / "output", work / "output")
    manifest["stages"][str(node)] = {
        **basis.record(),
        "judged": stage.judged,
        "outputs": {str(final.relative_to(folder) / name): record for name, record in outputs.items()},
        "figures": result["figures"],
        "warnings": result["warnings"],
        "commands": result["commands"],
        "started": round(started, 3),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(ended.cpu_seconds, 3),
        "peak_memory_bytes": ended.peak_memory_bytes,
        "made_with": made_with,
    }
    # First the record: after a crash in between its files are missing or others, so the node runs again.
    write_manifest(folder, manifest)
    _publish(work / "output", final)
    shutil.rmtree(work, ignore_errors=True)
    append_event(folder, "done", stage=str(node), seconds=round(seconds, 3))
    console.say(f"  done in {seconds:.1f} s")


def _result(path: Path, status: int, node: Node, layout: Layout, smaller: str) -> dict[str, Any]:
    if path.is_file():
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result
    log = layout.log(node.stage, node.variant)
    if shutil.disk_usage(layout.run).free < _NOTHING:
        return {
            "error": f"{node}: no space left on the disk of {layout.run}; free some and give the same command again"
        }
    if status == -signal.SIGKILL:
        cause = f"was killed, as a machine does that is out of memory: {smaller}"
    elif status < 0:
        cause = f"was ended by signal {signal.Signals(-status).name}"
    else:
        cause = f"ended with status {status}"
    return {"error": f"{node}: {cause}; its log is {log}. The same command continues here."}


def _refuse_unrecorded(targets: Sequence[Node], manifest: dict[str, Any], folder: Path) -> None:
    """What is in the place of a node's outputs and is not recorded is somebody's own."""
    foreign = []
    for node in targets:
        final = Layout(folder).node(node.stage, node.variant)
        if str(node) in manifest["stages"] or not final.exists():
            continue
        # `pipeline verify RUN` leaves its result where the stage would, without a record.
        if final.is_file() or {path.name for path in final.iterdir()} - {Layout(folder).verify_json.name}:
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

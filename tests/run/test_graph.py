"""The graph over small stages of the tests' own: what runs, what is skipped, what a crash leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.commands import launcher, pipeline
from support.small_models import BASE, RECORD
from support.small_stages import FIRST, SECOND, STAGES

from pipeline.cli import resolved
from pipeline.config import Config
from pipeline.errors import PipelineError, UserError
from pipeline.run.basis import settings_of
from pipeline.run.folder import locked, read_manifest, record_files, write_manifest
from pipeline.run.graph import Graph, Node
from pipeline.run.layout import Layout
from pipeline.stages import all_stages

GRAPH = Graph(STAGES)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "input.txt").write_text("text")
    return Config.model_validate(
        {
            "model": {"base": "x"},
            "data": {"train": tmp_path / "input.txt"},
            "run": {"folder": tmp_path / "run"},
            "export": {"quant": ("a", "b")},
        }
    )


def run(config: Config, **options: bool) -> list[str]:
    """Run everything; return the nodes that had to run."""
    states = GRAPH.run(config, {}, GRAPH.nodes(config), launcher=launcher(), **options)
    return [str(state.node) for state in states if state.reason is not None]


def with_types(config: Config, *types: str) -> Config:
    return config.model_copy(update={"export": config.export.model_copy(update={"quant": types})})


def test_everything_runs_once_then_nothing(config: Config) -> None:
    assert run(config) == ["first", "second/a", "second/b", "third"]
    assert (config.run_folder / "third" / "all.txt").read_text() == "TEXT3407a TEXT3407b"
    assert run(config) == []


def test_a_new_type_runs_only_what_follows_it(config: Config) -> None:
    run(config)
    assert run(with_types(config, "a", "b", "c")) == ["second/c", "third"]
    assert run(config) == ["third"]  # a and b are still there
    manifest = read_manifest(config.run_folder)
    assert "second/c" in manifest["stages"]
    assert "second/c" not in manifest["nodes"]


def test_configuration_input_and_code_make_stale(config: Config) -> None:
    run(config)
    seeded = config.model_copy(update={"train": config.train.model_copy(update={"seed": 5})})
    states = GRAPH.examine(seeded, read_manifest(config.run_folder), GRAPH.nodes(seeded))
    assert [state.reason for state in states] == [
        "train.seed has changed",
        "first runs before it",
        "first runs before it",
        "second/a runs before it",
    ]
    config.data.train.write_text("other")
    assert GRAPH.status(config)[0]["reason"] == "input.txt has changed"


def test_unchanged_outputs_keep_what_follows_fresh(config: Config) -> None:
    run(config)
    os.utime(config.data.train)  # touched, not changed
    assert run(config) == []
    assert run(config, force=True) == ["first", "second/a", "second/b", "third"]


def test_a_file_that_is_not_read_makes_nothing_stale(config: Config) -> None:
    run(config)
    path = config.run_folder / "first" / "unread.txt"
    manifest = read_manifest(config.run_folder)
    path.write_text("by another first stage")
    manifest["stages"]["first"]["outputs"] |= record_files(path.parent, config.run_folder)
    write_manifest(config.run_folder, manifest)
    assert run(config) == []


def test_what_could_not_be_done_is_tried_again(config: Config) -> None:
    one = with_types(config, "a")
    assert run(one) == ["first", "second/a", "third"]
    assert [row["reason"] for row in GRAPH.status(one)] == [None, None, "there were no two"]
    assert run(one) == ["third"]


def test_what_a_stage_removes_is_made_again_for_that_stage_alone(config: Config) -> None:
    def keeping(keep: bool) -> Config:
        return config.model_copy(update={"merge": config.merge.model_copy(update={"keep": keep})})

    second, third = ["second/a", "second/b"], config.run_folder / "third" / "all.txt"
    removed = config.run_folder / "second" / "a" / "upper.txt"
    run(config)
    assert run(keeping(False)) == []  # it is removed even where nothing runs
    assert not removed.exists()
    assert (removed.parent / "half.txt").exists()
    assert [row["reason"] for row in GRAPH.status(keeping(False))] == [None] * 4
    third.unlink()
    again = "third runs again, for which it was removed"
    assert [row["reason"] for row in GRAPH.status(keeping(False))][1:3] == [again, again]
    assert run(keeping(False)) == [*second, "third"]
    assert GRAPH.run(keeping(False), {}, [Node("third")], force=True)[-1].reason == "it was asked for"
    assert not removed.exists()
    assert run(with_types(keeping(False), "a", "b", "c")) == [*second, "second/c", "third"]
    assert [row["reason"] for row in GRAPH.status(config)][1] == "second/a/upper.txt is missing"
    assert run(config) == [*second, "third"]
    assert removed.exists()


def test_a_changed_output_runs_again(config: Config) -> None:
    run(config)
    (config.run_folder / "second" / "a" / "upper.txt").write_text("tampered")
    assert run(config) == ["second/a"]  # and it gives the same file, so the third stays
    (config.run_folder / "third" / "all.txt").unlink()
    assert run(config) == ["third"]


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("user mistake", UserError, "the text is wrong"),
        ("broken", PipelineError, "ValueError: a detail"),
        ("killed", PipelineError, "out of memory: write a shorter text; its log is"),
        ("large", PipelineError, "out of memory: write a shorter text; the log is"),
    ],
)
def test_a_failed_stage_leaves_one_message_and_nothing_half(
    config: Config, text: str, kind: type[PipelineError], said: str
) -> None:
    config.data.train.write_text(text)
    with pytest.raises(kind, match=said) as caught:
        run(config)
    assert type(caught.value) is kind
    assert not (config.run_folder / "second").exists()
    assert (config.run_folder / "first" / "text.txt").exists()
    assert "Traceback" not in str(caught.value)


def test_a_full_disk_is_named_and_left_with_room(config: Config, small_disk: Path) -> None:
    config.data.train.write_text("disk full")
    full = config.model_copy(update={"run": config.run.model_copy(update={"folder": small_disk / "run"})})
    for _ in range(2):
        with pytest.raises(PipelineError, match="no space left on the disk of") as caught:
            run(full)
        assert type(caught.value) is PipelineError
        assert shutil.disk_usage(small_disk).free > 2**22
    config.data.train.write_text("text")
    assert run(full) == ["first", "second/a", "second/b", "third"]


def test_a_disk_that_is_full_before_anything_runs(tmp_path: Path, small_disk: Path) -> None:
    with suppress(OSError), (small_disk / "large").open("wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass
    toml = tmp_path / "pipeline.toml"
    toml.write_text(f"[model]\nbase = '{BASE}'\n[data]\ntrain = 'input.txt'\n[run]\nfolder = '{small_disk}/run'\n")
    (tmp_path / "input.txt").touch()
    result = pipeline("data", toml)
    assert result.exit_code == 1
    assert result.stderr == "error: no space left on the disk; free some and give the same command again\n"


@pytest.mark.parametrize(("goes_on", "found"), [(True, "left"), (False, "")])
def test_after_a_kill_the_same_command_continues(config: Config, goes_on: bool, found: str) -> None:
    """With what the stage left in its scratch folder, where the stage can go on from there."""
    graph = Graph((FIRST, replace(SECOND, goes_on=goes_on)))
    config.data.train.write_text("killed")
    with pytest.raises(PipelineError, match="The same command continues"):
        graph.run(config, {}, [Node("second", "a")], launcher=launcher())
    graph.run(config, {}, [Node("second", "a")], launcher=launcher())
    assert (config.run_folder / "second" / "a" / "upper.txt").read_text() == "KILLED3407a"
    assert (config.run_folder / "second" / "a" / "found.txt").read_text() == found


def test_the_program_killed_with_its_stage_continues(config: Config, tmp_path: Path) -> None:
    config.data.train.write_text("slow")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    program = (
        f"import sys; sys.path.append({str(Path(__file__).parents[1])!r})\n"
        "from pathlib import Path; from pipeline.run.graph import Graph; from pipeline.config import Config\n"
        "from support.small_stages import STAGES\n"
        f"config = Config.model_validate_json(Path({str(tmp_path / 'config.json')!r}).read_text())\n"
        "Graph(STAGES).run(config, {}, Graph(STAGES).nodes(config))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    half = Layout(config.run_folder).partial("second", "a") / "output" / "half.txt"
    deadline = time.monotonic() + 60
    while not half.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(UserError, match=f"another process .process id {process.pid}."):
        run(config)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # the kernel ends the stage with its parent
    config.data.train.write_text("quick")
    assert run(config) == ["first", "second/a", "second/b", "third"]
    assert (config.run_folder / "third" / "all.txt").read_text() == "QUICK3407a QUICK3407b"


def test_manifest_records_what_a_reader_needs(config: Config) -> None:
    run(config)
    record = read_manifest(config.run_folder)["stages"]["second/a"]
    assert record["warnings"] == ["variant a"]
    assert set(record["inputs"]) == {"first/text.txt"}
    assert len(record["outputs"]["second/a/upper.txt"]["sha256"]) == 64
    assert record["peak_memory_bytes"] > 10**6
    assert record["seconds"] > 0
    kinds = [json.loads(line)["kind"] for line in (config.run_folder / "events.jsonl").read_text().splitlines()]
    assert kinds == ["start", "done", *["start", "warning", "done"] * 2, "start", "done"]


def test_the_machine_of_the_first_stage_is_kept(config: Config) -> None:
    GRAPH.run(config, {}, [Node("first")], launcher=launcher())
    manifest = read_manifest(config.run_folder)
    assert manifest["first_machine"]["machine"] == manifest["machine"]
    manifest["first_machine"]["machine"]["gpu_memory_bytes"] = 24 * 2**30  # it was another one
    write_manifest(config.run_folder, manifest)
    run(config)
    assert read_manifest(config.run_folder)["first_machine"] == manifest["first_machine"]


def test_status_says_what_is_missing_and_what_is_stale(config: Config) -> None:
    text = config.data.train.read_text()
    config.data.train.unlink()  # what was never read is not looked for: it could be a base on a hub
    assert [row["state"] for row in GRAPH.status(config)] == ["missing"] * 4
    config.data.train.write_text(text)
    run(config)
    assert [row["state"] for row in GRAPH.status(config)] == ["fresh"] * 4
    config.data.train.write_text("other")
    assert [row["state"] for row in GRAPH.status(config)] == ["stale"] * 4
    config.data.train.unlink()
    rows = GRAPH.status(config)
    assert [row["state"] for row in rows] == ["stale"] * 4
    assert rows[0]["reason"] == f"{config.data.train}: no such file"
    assert rows[1]["reason"] == "first runs before it"


def test_a_folder_is_worked_on_by_one(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match="another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written .*run.folder"), locked(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"cannot be read \("),
        ("[]", r"is no manifest of this program \(no object\)"),
        ('{"manifest_version": 3}', r"is no manifest of this program \(stages\)"),
        ('{"stages": {"data": {}}}', r"is no manifest of this program \(stages.data.fingerprint\)"),
        ('{"stages": {}, "files": {"x": {}}}', r"is no manifest of this program \(files.x.size\)"),
    ],
)
def test_a_broken_manifest_is_named(config: Config, text: str, said: str) -> None:
    config.run_folder.mkdir()
    (config.run_folder / "manifest.json").write_text(text)
    for command in (run, GRAPH.status):
        with pytest.raises(PipelineError, match=rf"manifest.json: {said}.*; choose another folder with run.folder"):
            command(config)
    assert [path.name for path in config.run_folder.iterdir()] == ["manifest.json"]


def test_a_folder_that_is_no_run_stays_as_it_is(config: Config) -> None:
    own = config.run_folder / "first" / "mine.txt"
    own.parent.mkdir(parents=True)
    own.touch()
    with pytest.raises(UserError, match=r"run.folder: .*run: is not empty and was made by no run.*choose another"):
        run(config)
    assert [path for path in config.run_folder.rglob("*") if path.is_file()] == [own]


def test_a_folder_in_a_run_that_no_stage_has_made_stays(config: Config) -> None:
    config.run_folder.mkdir()
    (config.run_folder / ".gitkeep").touch()  # takes nobody's place
    GRAPH.run(config, {}, [Node("first")], launcher=launcher())
    own = config.run_folder / "third" / "mine.txt"
    own.parent.mkdir()
    own.touch()
    with pytest.raises(UserError, match=r"run.folder: .*third: not recorded as made by this run.*move it away"):
        run(config)
    assert own.exists()
    assert not (config.run_folder / "second").exists()  # it is said before anything runs
    own.rename(own.with_name("verify.json"))  # what `pipeline verify RUN` leaves
    assert run(config) == ["second/a", "second/b", "third"]
    assert [path.name for path in own.parent.iterdir()] == ["all.txt"]


def _leave(config: Config, *names: str) -> None:
    """Take everything but these away from a run's folder."""
    for path in config.run_folder.iterdir():
        if path.name not in (".lock", ".lock.pid", *names):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "left",
    [
        (),  # the lock alone
        ("config.json",),
        ("config.json", "manifest.json", "events.jsonl"),  # a record, and its folder not yet in place
        ("config.json", "manifest.json", "events.jsonl", "first"),
    ],
)
def test_what_a_crash_at_any_moment_leaves_goes_on(config: Config, left: tuple[str, ...]) -> None:
    run(config)
    _leave(config, *left)
    assert run(config)[-3:] == ["second/a", "second/b", "third"]
    assert (config.run_folder / "third" / "all.txt").read_text() == "TEXT3407a TEXT3407b"


def test_a_setting_that_is_not_declared_cannot_be_read(config: Config) -> None:
    config.data.train.write_text("undeclared")
    with pytest.raises(PipelineError, match=r"the stage first reads train\.batch, which its declaration does not name"):
        run(config)
    assert not (config.run_folder / "first").exists()


def test_preflight_that_is_typed_looks_every_time(tmp_path: Path, small_disk: Path) -> None:
    """Also where it is up to date: here it finds a disk that is too small by now."""
    (tmp_path / "input.txt").touch()
    (tmp_path / "pipeline.toml").write_text(
        f"[model]\nbase = '{BASE}'\n[data]\ntrain = 'input.txt'\n[run]\nfolder = '{small_disk}/run'\n"
    )
    settings, _ = resolved(tmp_path, ())
    layout = Layout(settings.run_folder)
    layout.preflight_json.parent.mkdir(parents=True)
    layout.preflight_json.write_text("{}")
    manifest: dict[str, Any] = {"stages": {}, "files": {}}
    basis = Graph(all_stages()).basis(Node("preflight"), settings, manifest)
    outputs = record_files(layout.node("preflight"), layout.run)
    manifest["stages"]["preflight"] = {**RECORD, **basis.record(), "outputs": outputs}
    write_manifest(layout.run, manifest)

    rows = json.loads(pipeline("status", tmp_path, "--json").stdout)["stages"]
    assert (rows[0]["stage"], rows[0]["state"]) == ("preflight", "fresh")
    result = pipeline("preflight", tmp_path)
    assert result.exit_code == 1
    assert "preflight's copies of the base" in result.stderr


def test_another_type_leaves_what_is_before_it_fresh() -> None:
    config = Config.model_validate({"model": {"base": "x"}, "data": {"train": "x.jsonl", "test": "y.jsonl"}})
    other = with_types(config, "q8_0")
    independent = ("preflight", "data", "train", "merge", "convert", "quantize", "modelfile")
    for stage in all_stages():
        if stage.name in independent:
            assert settings_of(stage, "", config) == settings_of(stage, "", other), stage.name


def test_every_real_stage_names_only_stages_and_settings_that_exist() -> None:
    config = Config.model_validate({"model": {"base": "x"}, "data": {"train": "x.jsonl", "test": "y.jsonl"}})
    graph = Graph(all_stages())
    order = [str(node) for node in graph.nodes(config)]
    for node in graph.nodes(config):
        for needed in graph.needs(node, config):
            assert order.index(str(needed)) < order.index(str(node))
        settings_of(graph.stages[node.stage], node.variant, config)  # an unknown one is an error

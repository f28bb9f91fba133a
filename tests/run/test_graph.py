"""The graph over small stages of the tests' own: what runs, what is skipped, what a crash leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest
from support.small_models import BASE
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.config import Config
from pipeline.errors import PipelineError, UserError
from pipeline.run import graph
from pipeline.run.folder import locked, read_manifest, record_files, write_manifest

# Stands in for pipeline/stages: three stages, the second with a variant for each quantization type.
STAGES = {
    "first": """
        NEEDS = ()
        CONFIG = ("train.seed",)
        def inputs(config):
            return [config.data.train]
        def main(work):
            text = work.config.data.train.read_text()
            (work.output / "text.txt").write_text(f"{text}{work.config.train.seed}")
            (work.output / "unread.txt").write_text(str(work.config.train.seed + len(text)))
            return {"length": len(text)}
    """,
    "second": """
        import os, signal, time
        from pipeline.errors import PipelineError, UserError
        NEEDS = ("first",)
        CONFIG = ()
        READS = {"first": ("text.txt",)}
        def variants(config):
            return config.export.quant
        def main(work):
            text = (work.folder("first") / "text.txt").read_text()
            (work.output / "half.txt").write_text("half")
            if "user mistake" in text:
                raise UserError("the text is wrong; write another")
            if "disk full" in text:
                (work.output / "large.txt").write_bytes(bytes(2**24))
            if "broken" in text:
                raise ValueError("a detail")
            if "killed" in text and not (work.scratch / "again").exists():
                (work.scratch / "again").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if "slow" in text:
                time.sleep(60)
            (work.output / "upper.txt").write_text(text.upper() + work.variant)
            work.warn(f"variant {work.variant}")
            return {}
    """,
    "third": """
        NEEDS = ("second",)
        CONFIG = ()
        def main(work):
            parts = sorted(path.read_text() for path in (work.run / "second").glob("*/upper.txt"))
            (work.output / "all.txt").write_text(" ".join(parts))
            return {"parts": len(parts)}
        def unfinished(figures):
            return "there were no two" if figures["parts"] == 1 else None
    """,
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    for name, source in STAGES.items():
        (tmp_path / f"stages_{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
    # The worker is a process of its own: it learns of these stages the way every process starts.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib, pipeline.run.graph as graph\n"
        "graph.stage_module = lambda stage: importlib.import_module(f'stages_{stage}')\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(graph.__file__).parents[2])]))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in STAGES:
        sys.modules.pop(f"stages_{name}", None)
    import importlib

    monkeypatch.setattr(graph, "stage_module", lambda stage: importlib.import_module(f"stages_{stage}"))
    monkeypatch.setattr(graph, "STAGES", tuple(STAGES))
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
    states = graph.run(config, {}, graph.nodes(config), **options)
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
    states = graph.examine(seeded, read_manifest(config.run_folder), graph.nodes(seeded))
    assert [state.reason for state in states] == [
        "train.seed has changed",
        "first runs before it",
        "first runs before it",
        "second/a runs before it",
    ]
    config.data.train.write_text("other")
    assert graph.status(config)[0]["reason"] == "input.txt has changed"


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
    assert [row["reason"] for row in graph.status(one)] == [None, None, "there were no two"]
    assert run(one) == ["third"]


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
        ("killed", PipelineError, "out of memory"),
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
    result = CliRunner().invoke(main, ["data", str(toml)])
    assert result.exit_code == 1
    assert result.stderr == "error: no space left on the disk; free some and give the same command again\n"


def test_after_a_kill_the_same_command_continues(config: Config) -> None:
    config.data.train.write_text("killed")
    with pytest.raises(PipelineError, match="The same command continues"):
        run(config)
    # What the killed stage left in its scratch folder is still there, so this time it is not killed.
    graph.run(config, {}, [graph.Node("second", "a")])
    assert (config.run_folder / "second" / "a" / "upper.txt").read_text() == "KILLED3407a"


def test_the_program_killed_with_its_stage_continues(config: Config, tmp_path: Path) -> None:
    config.data.train.write_text("slow")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    program = (
        "import sys; from pathlib import Path; from pipeline.run import graph; from pipeline.config import Config\n"
        f"graph.STAGES = {tuple(STAGES)!r}\n"
        f"config = Config.model_validate_json(Path({str(tmp_path / 'config.json')!r}).read_text())\n"
        "graph.run(config, {}, graph.nodes(config))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    half = config.run_folder / graph.PARTIAL / "second__a" / "output" / "half.txt"
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


def test_status_says_what_is_missing_and_what_is_stale(config: Config) -> None:
    text = config.data.train.read_text()
    config.data.train.unlink()  # what was never read is not looked for: it could be a base on a hub
    assert [row["state"] for row in graph.status(config)] == ["missing"] * 4
    config.data.train.write_text(text)
    run(config)
    assert [row["state"] for row in graph.status(config)] == ["fresh"] * 4
    config.data.train.write_text("other")
    assert [row["state"] for row in graph.status(config)] == ["stale"] * 4
    config.data.train.unlink()
    rows = graph.status(config)
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
    for command in (run, graph.status):
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
    graph.run(config, {}, [graph.Node("first")])
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


@pytest.mark.parametrize("moment", ["read_manifest", "_run_node", "_publish", "append_event"])
def test_a_crash_at_any_moment_leaves_a_folder_that_goes_on(
    config: Config, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """With the lock alone, without a manifest, with a record and no folder, and with both."""

    def crash(*values: object, **_: object) -> None:
        if "start" not in values:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(graph, moment, crash)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert run(config)[-3:] == ["second/a", "second/b", "third"]
    assert (config.run_folder / "third" / "all.txt").read_text() == "TEXT3407a TEXT3407b"


def test_preflight_that_is_typed_looks_every_time(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stages_preflight.py").write_text(
        "import json\nNEEDS = CONFIG = ()\n"
        "def main(work):\n"
        "    (work.output / 'preflight.json').write_text(json.dumps(work.config.export.quant))\n"
        "    return {}\n"
    )
    monkeypatch.setattr(graph, "STAGES", ("preflight", *STAGES))
    (tmp_path / "pipeline.toml").write_text(f"[model]\nbase = '{BASE}'\n[data]\ntrain = 'input.txt'\n")
    for kind in ("q4_k_m", "q8_0"):
        command = ["preflight", str(tmp_path), "--json", "--set", f"export.quant={kind}"]
        result = CliRunner().invoke(main, command, catch_exceptions=False)
        assert json.loads(result.stdout) == [kind]


def test_another_type_leaves_what_is_before_it_fresh() -> None:
    config = Config.model_validate({"model": {"base": "x"}, "data": {"train": "x.jsonl"}})
    other = with_types(config, "q8_0")
    for stage in graph.STAGES[: graph.STAGES.index("quantize")]:
        assert graph._settings(graph.Node(stage), config) == graph._settings(graph.Node(stage), other), stage


def test_every_real_stage_names_only_stages_and_settings_that_exist() -> None:
    config = Config.model_validate({"model": {"base": "x"}, "data": {"train": "x.jsonl", "test": "y.jsonl"}})
    values = config.model_dump(mode="json")
    order = [str(node) for node in graph.nodes(config)]
    for node in graph.nodes(config):
        for needed in graph.needs(node, config):
            assert order.index(str(needed)) < order.index(str(node))
        for key in graph.stage_module(node.stage).CONFIG:
            value = values
            for part in key.split("."):
                value = value[part]

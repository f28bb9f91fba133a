"""What makes a stage stale, and what does not: the program's own stages, on a run that says that all is up to date."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file
from support.small_models import RECORD

import pipeline
from pipeline.cli import resolved
from pipeline.config import Config
from pipeline.defaults import Facts, resolve
from pipeline.resources import resource
from pipeline.run.basis import Basis
from pipeline.run.folder import write_manifest
from pipeline.run.graph import Graph
from pipeline.run.provenance import first_machine, keep_first_machine
from pipeline.stages import all_stages
from pipeline.toml_file import load_config

GRAPH = Graph(all_stages())
TOML = """
[model]
base = "base"
trust_remote_code = true
[data]
train = "train.jsonl"
test = "train.jsonl"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a configuration, rows, and the outline of a base that brings its own code."""
    import numpy

    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 512}')
    (base / "tokenizer.json").write_text("{}")
    (base / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (base / "modeling.py").write_text("SCALE = 1\n")
    save_file({"x": numpy.zeros(4, dtype="float16")}, base / "model.safetensors")
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "pipeline.toml").write_text(TOML)
    return tmp_path


def made(config: Config, **changes: Any) -> dict[str, Any]:
    """A manifest of a run in which everything is done, from another basis where changes say so."""
    manifest: dict[str, Any] = {"stages": {}, "files": {}}
    for node in GRAPH.nodes(config):
        basis = GRAPH.basis(node, config, manifest)
        for name, values in changes.items():
            before = {key: value for key, value in values.items() if key in getattr(basis, name)}
            basis = replace(basis, **{name: getattr(basis, name) | before})
        manifest["stages"][str(node)] = {**RECORD, **basis.record(), "figures": {"deployed": True}}
    return manifest


def stale(config: Config, manifest: dict[str, Any]) -> dict[str, str]:
    """The nodes that have to run for a reason of their own, with it."""
    reasons = {
        str(node): GRAPH.basis(node, config, manifest).changed_since(manifest["stages"][str(node)])
        for node in GRAPH.nodes(config)
    }
    return {node: reason for node, reason in reasons.items() if reason is not None}


def given(project: Path, *overrides: str) -> Config:
    return resolved(project, overrides)[0]


def with_value(config: Config, key: str, value: Any) -> Config:
    section, name = key.split(".")
    return config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})


def test_nothing_has_changed(project: Path) -> None:
    assert stale(given(project), made(given(project))) == {}


@pytest.mark.parametrize(
    ("key", "value", "affected"),
    [
        ("verify.tokens", 600, {"verify"}),
        ("export.quant", ("q8_0",), {"deploy", "evaluate/table", "verify", "report"}),
        ("export.outtype", "f16", {"convert"}),
        ("train.report_to", "tensorboard", set()),
        ("train.save_interval", 5, set()),
        ("train.learning_rate", 0.5, {"train"}),
        (
            *("train.load_in_4bit", False),
            {"preflight", "train", "merge", "evaluate/adapter", "evaluate/table", "verify"},
        ),
        ("ollama.replace", True, set()),
        ("ollama.license", "MIT", {"modelfile/q4_k_m", "modelfile/q8_0"}),
        ("merge.base", "16bit", {"merge", "verify"}),
        ("merge.keep", False, {"convert", "evaluate/merged", "verify"}),
        ("ollama.parameters", {"temperature": 0}, {"modelfile/q4_k_m", "modelfile/q8_0", "verify"}),
    ],
)
def test_a_setting_makes_stale_what_depends_on_it(project: Path, key: str, value: Any, affected: set[str]) -> None:
    config = given(project, "export.quant=['q4_k_m', 'q8_0']")
    reasons = stale(with_value(config, key, value), made(config))
    # The page shows every value.
    assert reasons == dict.fromkeys(affected | {"report"}, f"{key} has changed")


def test_of_a_table_an_entry_makes_stale_what_depends_on_it(project: Path) -> None:
    config = given(project)
    reasons = stale(with_value(config, "ollama.parameters", {"num_ctx": 512}), made(config))
    assert reasons.keys() == {"data", "modelfile/q4_k_m", "verify", "report"}
    assert reasons["data"] == "ollama.parameters.num_ctx has changed"


def test_a_base_that_was_moved_is_the_same_base(project: Path) -> None:
    config = given(project)
    manifest = made(config)
    (project / "elsewhere").mkdir()
    (project / "base").rename(project / "elsewhere" / "base")
    assert stale(given(project, "model.base=elsewhere/base"), manifest) == {}
    (project / "elsewhere" / "base" / "tokenizer.json").write_text("[]")
    reasons = stale(given(project, "model.base=elsewhere/base"), manifest)
    assert {"data", "train", "merge"} <= reasons.keys()
    assert set(reasons.values()) == {"tokenizer.json has changed"}


def test_another_library_makes_stale_what_declares_it(project: Path) -> None:
    config = given(project)
    reasons = stale(config, made(config, versions={"unsloth": "2026.10.8"}))
    now = GRAPH.basis(GRAPH.nodes_of("train", config)[0], config, made(config)).versions["unsloth"]
    assert reasons == {"train": f"unsloth is {now}, was 2026.10.8"}
    reasons = stale(config, made(config, versions={"llama.cpp": "0.0.1"}))
    assert "convert" in reasons
    assert reasons["convert"].endswith(", was 0.0.1")
    assert not {"data", "train", "merge"} & reasons.keys()


def test_builds_of_one_version_are_one_version(project: Path) -> None:
    config = given(project)
    versions = GRAPH.basis(GRAPH.nodes_of("train", config)[0], config, made(config)).versions
    assert not [version for version in versions.values() if version is None or "+" in version]


def test_changed_python_of_a_base_that_may_run_it(project: Path) -> None:
    config = given(project)
    manifest = made(config)
    (project / "base" / "modeling.py").write_text("SCALE = 2\n")
    reasons = stale(config, manifest)
    assert {"preflight", "data", "train"} <= reasons.keys()
    assert set(reasons.values()) == {"modeling.py has changed"}
    untrusted = given(project, "model.trust_remote_code=false")
    manifest = made(untrusted)
    (project / "base" / "modeling.py").write_text("SCALE = 3\n")
    assert stale(untrusted, manifest) == {}


def test_files_that_changed_their_places_are_others() -> None:
    """Training data and test data that were mixed up; elsewhere they may lie."""
    was, there = Basis("x", {}, {}, {}, {"/f/train": "1", "/f/test": "2"}), {"/g/train": "1", "/g/test": "2"}
    assert replace(was, inputs=there).changed_since(was.record()) is None
    swapped = replace(was, inputs={"/f/train": "2", "/f/test": "1"})
    assert swapped.changed_since(was.record()) == "other files, or the same in another order"


def test_a_reason_is_the_first_difference_in_words() -> None:
    was = Basis("x", {"a.b": 1}, {"m": "1", "n": "1"}, {"lib": "1"}, {"/f/x.txt": "1", "a/1": "2", "b/1": "3"})
    cases = {
        "a.b has changed": replace(was, settings={"a.b": 2}),
        "x.txt has changed": replace(was, inputs=was.inputs | {"/f/x.txt": "2"}),
        "1 has changed": replace(was, inputs=was.inputs | {"a/1": "3", "b/1": "2"}),
        "lib is 2, was 1": replace(was, versions={"lib": "2"}),
        "lib is not installed, was 1": replace(was, versions={"lib": None}),
        "the code of n has changed": replace(was, code={"m": "1", "n": "2"}),
        "the code of m and of 1 more modules has changed": replace(was, code={"n": "2"}),
        "it was made by another version of this program": replace(was, versions={"lib": "1", "other": "1"}),
    }
    assert {words: now.changed_since(was.record()) for words, now in cases.items()} == {words: words for words in cases}
    assert replace(was, inputs={"/moved/x.txt": "1", "a/1": "2", "b/1": "3"}).changed_since(was.record()) is None


def test_status_of_a_program_whose_code_has_changed(project: Path) -> None:
    """A copy of the program is changed, and its own `status` is asked."""
    program = project / "program"
    shutil.copytree(Path(pipeline.__file__).parent, program / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("templates", "third_party", "requirements.lock"):
        (program / name).symlink_to(resource(name))
    config = given(project)

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=program, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def states() -> dict[str, str | None]:
        document = json.loads(command("-m", "pipeline", "status", str(project), "--json"))
        return {row["stage"]: row["reason"] for row in document["stages"]}

    config.run_folder.mkdir()
    (config.run_folder / "manifest.json").write_text(json.dumps(made(config)))
    assert set(states().values()) == {None}
    for file, old, new in (
        ("setup/build.py", "\n\n\n", "\n\n\n# A remark.\n"),
        ("plots.py", "linewidth=1.8", "linewidth=2.5"),
    ):
        path = program / "pipeline" / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    assert set(states().values()) == {None}
    path = program / "pipeline" / "prompt" / "labels.py"
    path.write_text(path.read_text().replace("IGNORED = -100", "IGNORED = -101"))
    assert states()["data"] == "the code of pipeline.prompt.labels has changed"
    assert states()["train"] == "data runs before it"


def test_defaults_of_a_machine_stay_those_of_the_first_stage(project: Path) -> None:
    keys = ("batch", "accumulation", "optimizer", "gradient_checkpointing")
    config, given = load_config(project / "pipeline.toml")
    without, with_gpu = {"gpu_memory_bytes": None}, {"gpu_memory_bytes": 24 * 2**30}

    def train(manifest: dict[str, Any], here: dict[str, Any], config: Config = config) -> tuple[list[Any], str]:
        """The values on this machine, and where the batch is from."""
        first = first_machine(manifest, config.model)
        facts = Facts(8 * 10**9, 2048, (first or here)["gpu_memory_bytes"], kept=first is not None)
        settings, sources = resolve(config, given, facts)
        return [getattr(settings.train, key) for key in keys], sources["train.batch"]

    fresh: dict[str, Any] = {}
    begun: dict[str, Any] = {}
    keep_first_machine(begun, config.model, without)
    keep_first_machine(begun, config.model, with_gpu)
    on_cpu, _ = train(fresh, without)
    on_gpu, words = train(fresh, with_gpu)
    assert all(here != there for here, there in zip(on_cpu, on_gpu, strict=True))
    assert words == "default for a GPU with 24 GiB"
    kept = "default for a machine without a GPU, kept from this run's first stage"
    assert train(begun, with_gpu) == (on_cpu, kept)
    assert train(begun, with_gpu, with_value(config, "train.batch", 3))[0] == [3, *on_cpu[1:]]
    assert train(begun, with_gpu, with_value(config, "model.base", "another"))[0] == on_gpu

    elsewhere: dict[str, Any] = {"stages": {}, "files": {}}
    keep_first_machine(elsewhere, config.model, with_gpu)
    config.run_folder.mkdir()
    write_manifest(config.run_folder, elsewhere)
    _, sources = resolved(project, ["train.batch=5"])
    assert sources["train.batch"] == "--set train.batch=5"
    assert sources["train.optimizer"] == "default for a GPU with 24 GiB, kept from this run's first stage"

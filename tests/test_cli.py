"""The command line: quick help, one message for every mistake, the right exit status."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from support.commands import pipeline

from pipeline.cli import main
from pipeline.errors import PipelineError
from pipeline.run.layout import Layout

CONFIG = '[model]\nbase = "smollm2-135m-instruct"\n[data]\ntrain = "train.jsonl"\n'
ROW = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pipeline.toml").write_text(CONFIG)
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    return tmp_path


@pytest.mark.parametrize("name", [None, *main.list_commands(click.Context(main))])
def test_help_imports_nothing_heavy(name: str | None) -> None:
    """A time cannot be asserted on a shared machine; what costs the time can."""
    arguments = [name, "--help"] if name else ["--help"]
    program = (
        "import sys; from pipeline.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich', 'httpx', 'ollama', 'jinja2', 'gguf'}\n"
        "found = heavy & set(sys.modules); assert not found, found"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "--help" in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "missing.toml"], "no such file"),
        (["run", "{project}", "--until", "trian"], "no such stage"),
        (["run", "{project}", "--set", "train.epochs"], "write section.key=value"),
        (["run", "{project}", "--set", "train.epocs=2"], "did you mean train.epochs?"),
        (["train", "{project}", "--set", "model.base=no-such-base"], "packaged are"),
        (["train", "{project}", "--set", "model.base={project}"], "config.json"),
        (["export", "{project}", "--quant", "q4_k_x"], "q4_k"),
        (["status", "{project}/nowhere"], "no such file"),
        (["quantise"], "Did you mean 'quantize'?"),
    ],
)
def test_mistakes_end_in_one_message_and_status_2(project: Path, arguments: list[str], said: str) -> None:
    result = pipeline(*(argument.replace("{project}", str(project)) for argument in arguments))
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not (project / "run" / "train").exists()


def test_what_export_prints_can_be_typed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cli.bring_up_to_date", lambda *_: None)
    path = project / "my run" / "modelfile" / "q4_k_m" / "Modelfile"
    path.parent.mkdir(parents=True)
    path.touch()
    result = pipeline("export", project, "--set", "run.folder=my run", "--set", "ollama.name=home")
    assert result.exit_code == 0, result.stderr
    assert f"ollama create home:latest -f '{path}'" in result.stderr.splitlines()


def test_bad_data_is_named_by_file_and_line(project: Path) -> None:
    (project / "train.jsonl").write_text('{"messages": []}\n')
    answer = pipeline("data", project)
    assert answer.exit_code == 2, answer.stderr
    assert "train.jsonl:1" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (project / "run" / "data").exists()


def test_config_prints_every_value_and_its_source(project: Path) -> None:
    import tomllib

    result = pipeline("config", project, "--set", "lora.r=8")
    assert result.exit_code == 0
    values = tomllib.loads(result.stdout)  # what is printed can be read again
    assert values["lora"]["r"] == 8
    assert "r = 8                                    # rank [--set lora.r=8]" in result.stdout.splitlines()
    document = json.loads(pipeline("config", project, "--json").stdout)
    assert document["sources"]["model.base"] == "pipeline.toml:2"
    assert document["meanings"]["lora.r"] == "rank"
    assert document["meanings"].keys() == document["sources"].keys()


def test_status_of_a_run_that_has_not_started(project: Path) -> None:
    result = pipeline("status", project, "--json")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["stages"]
    assert [row["stage"] for row in rows[:2]] == ["preflight", "data"]
    assert {row["state"] for row in rows} == {"missing"}


@pytest.mark.parametrize("command", ["status", "verify"])
@pytest.mark.parametrize("config", ['{"model_type": "llama"}', "{", '{"run": 1}'])
def test_a_models_folder_is_no_run(tmp_path: Path, command: str, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    result = pipeline(command, tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path}: is not a run's folder" in result.stderr
    assert f"pipeline verify --hf {tmp_path} --gguf FILE" in result.stderr


def test_a_library_that_is_missing(project: Path) -> None:
    program = "import sys; sys.modules['pydantic'] = None; from pipeline.cli import main; main()"
    command = [sys.executable, "-c", program, "config", str(project)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (1, "error: the library pydantic is missing: run `pipeline setup`\n")


def test_chat_streams_the_greedy_answer_and_an_error_of_the_model_does_not_hang() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.config import Model
    from pipeline.model.generate import answer_in_batches, stream_answer
    from pipeline.model.load import load_base

    model, tokenizer = load_base(Model(base="smollm2-135m-instruct"))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    pieces = list(stream_answer(model, tokenizer, question, 12))
    assert len(pieces) > 2
    assert ["".join(pieces)] == answer_in_batches(model, tokenizer, [question], 12, lambda done: None)

    small = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    )
    with pytest.raises(PipelineError, match="the model cannot answer: IndexError"):
        list(stream_answer(small, tokenizer, question, 12))


def test_an_interrupt_ends_a_stage_in_its_work_and_is_no_traceback(project: Path) -> None:
    text = json.dumps(ROW)
    with (project / "train.jsonl").open("w") as file:  # more than is read before the signal comes
        file.writelines(text.replace("hello", f"hello {number}") + "\n" for number in range(50_000))
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "data", str(project)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background has ignored
    )
    layout = Layout(project / "run")
    while not list(layout.partial("data").glob("output/*")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # a terminal tells the stage as well
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert not layout.data.exists()
    stages = json.loads(pipeline("status", project, "--json").stdout)["stages"]
    assert {row["stage"]: row["state"] for row in stages}["data"] == "missing"

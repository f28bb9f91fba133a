"""[[trainings]]: what each of them is by itself, and one command that trains two on one base."""

import re
from pathlib import Path

import pytest
from support.adapters import small_base
from support.commands import pipeline
from support.good_run import conversations, read_rows, write_rows

from pipeline.cli import resolved
from pipeline.errors import UserError
from pipeline.model.adapter_folder import read_given_adapter
from pipeline.run.layout import Layout
from pipeline.serve import together
from pipeline.toml_file import load_config, trainings_of
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import NOT_RUN, PASS
from pipeline.verify.trained_labels import check as check_labels

TEXT = """
[model]
base = "smollm2-135m-instruct"

[train]
epochs = 2

[[trainings]]
name = "sql"
data.train = "sql.jsonl"

[[trainings]]
name = "tone"
data.train = "tone.jsonl"
lora.r = 4

[trainings.ollama]
name = "polite"
parameters = { temperature = 0 }

[export]
quant = "q8_0"
"""
NAMES = ("sql", "tone", "combined")
BOTH = """
[[adapters]]
training = "sql"

[[adapters]]
training = "tone"
weight = 0.5
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "pipeline.toml"
    path.parent.mkdir()
    for name in ("sql", "tone"):
        (path.parent / f"{name}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    path.write_text(TEXT + BOTH)
    return path


def test_each_is_the_rest_of_the_file_with_its_own_keys(project: Path) -> None:
    assert trainings_of(project) == NAMES
    sql, _ = load_config(project, ["train.seed=1"], "sql")
    tone, given = load_config(project, ["run.folder=out", "train.epochs=3.0"], "tone")
    assert (sql.data.train, sql.lora.r, sql.ollama.name) == (project.parent / "sql.jsonl", 16, "home-sql")
    assert (tone.data.train, tone.lora.r, tone.ollama.name) == (project.parent / "tone.jsonl", 4, "polite")
    assert (sql.train.epochs, tone.train.epochs, sql.train.seed) == (2.0, 3.0, 1)
    assert (sql.run_folder, tone.run_folder) == (project.parent / "run" / "sql", project.parent / "out" / "tone")
    assert not sql.adapters
    assert (given["lora.r"], given["ollama.name"]) == ("pipeline.toml:15", "pipeline.toml:18")
    assert given["train.epochs"] == "--set train.epochs=3.0"
    names = [load_config(project, ["ollama.name=new"], name)[0].ollama.name for name in NAMES]
    assert names == ["new-sql", "new-tone", "new-combined"]


def test_they_are_combined_by_their_names(project: Path) -> None:
    config, _ = load_config(project, ["run.folder=out"], "combined")
    assert [(given.called, given.path) for given in config.adapters] == [
        (name, Layout(project.parent / "out" / name).adapter) for name in ("sql", "tone")
    ]
    assert config.data.train is None
    assert load_config(project, ["data.train=sql.jsonl"], "combined")[0].data.train is None
    assert config.train.load_in_4bit, "as the trainings are"
    project.write_text(project.read_text().replace("data.train", "train.load_in_4bit = false\ndata.train"))
    assert not load_config(project, training="combined")[0].train.load_in_4bit
    assert (config.run_folder, config.ollama.name) == (project.parent / "out" / "combined", "home-combined")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TEXT.replace('name = "sql"', "").replace("= 4", "= 5"), r"toml:8: trainings: name = None: each has a name"),
        (TEXT.replace('"tone"', '"SQL"'), r"toml:12: trainings: name = 'SQL': is taken"),
        (TEXT.replace('"tone"', '"combined"'), "'combined': is taken"),
        (TEXT.replace('"tone"', '"a/b"'), "name = 'a/b': each has a name, which a folder can have"),
        (TEXT.replace("lora.r = 4", 'model.base = "x"'), "toml:12: trainings: tone: model is the same for all"),
        (TEXT.replace("lora.r", "lora.rank"), r"toml:15: lora.rank: unknown key"),
        (TEXT.replace('"tone.jsonl"', '"nowhere.jsonl"'), r"toml:14: data.train: .*nowhere.jsonl: no such file"),
        (TEXT + BOTH.replace('"sql"', '"sq"'), "adapters: training = 'sq': there is none of this name; there are sql"),
        (TEXT + BOTH + 'path = "."\n', "adapters: path and training exclude each other"),
        (TEXT.replace("lora.r", "train.load_in_4bit = false\nlora.r") + BOTH, "combined was trained on one base"),
        (
            TEXT.replace('"tone.jsonl"', '"-"'),
            r"toml:14: data.train: -: standard input can be read once, .* give a file",
        ),
        (TEXT.replace("[export]", "[run]\nfolder = 5\n[export]") + BOTH, "run.folder = 5"),
        ("trainings = 3\n" + TEXT.partition("[[")[0], "each is a table"),
        (TEXT.partition("[[")[0], "--training tone: it has no"),
        (TEXT.replace("tone", "tune"), r"--training tone: there is none of this name: name one of .*: sql, tune"),
    ],
)
def test_mistakes(project: Path, text: str, said: str) -> None:
    project.write_text(text)
    with pytest.raises(UserError, match=said):
        for name in ("tone", "combined") if "adapters" in text else ("tone",):
            load_config(project, training=name)


def test_a_mistake_in_the_last_is_found_before_the_first_is_begun(project: Path) -> None:
    project.write_text(TEXT.replace("lora.r", "lora.rank"))
    told = pipeline("run", project)
    assert (told.exit_code, told.output.count("\n")) == (2, 1)
    assert "pipeline.toml:15: lora.rank: unknown key" in told.output
    assert not (project.parent / "run").exists()


def test_one_document_is_printed_of_one_of_them(project: Path) -> None:
    for command in (["config"], ["status", "--json"], ["plan", "--json"], ["preflight", "--json"]):
        told = pipeline(command[0], project, *command[1:])
        assert told.exit_code == 2
        assert isinstance(told.exception, SystemExit)
        assert "several trainings, and one is printed: --training sql, tone, combined" in told.output


def test_what_config_prints_of_each_is_a_configuration(project: Path) -> None:
    """The combination's too, whose adapters are not made yet; whatever stands in a text."""
    odd = ('ollama.system=a\n"b"\x7f\t\\', "ollama.license=é")
    for name in NAMES:
        told = pipeline("config", project, "--training", name, *(f"--set={text}" for text in odd))
        assert told.exit_code == 0, told.output
        printed = project.with_name(f"{name}.toml")
        printed.write_text(told.stdout)
        assert resolved(printed, ())[0] == resolved(project, odd, name)[0]


def judged(project: Path) -> tuple[set[str], str]:
    """What verify says of the rows that the combination was trained on: its verdicts, and the words that tell most."""
    config, _ = load_config(project / "pipeline.toml", training="combined")
    run = config.run_folder
    artefacts = Artefacts(
        *(config.verify, run, None, {}, project / "scratch"),
        **{"run": run, "config": config, "adapter": Layout(run).adapter, "given": config.given_adapters},
    )
    results = list(check_labels(artefacts))
    (words,) = {found[0] for result in results if (found := re.search(r"\d+ rows|run/sql: .* since", result.words))}
    return {result.verdict for result in results}, words


def test_two_on_one_base_are_trained_and_combined_by_one_command(tmp_path: Path) -> None:
    for name, rows in (("sql", conversations(3, 8)), ("tone", conversations(20, 8))):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    common = (
        f'[model]\nbase = "{small_base()}"\n[train]\nsteps = 2\nkeep = "last"\nmax_length = 512\nload_in_4bit = false\n'
    )
    (tmp_path / "pipeline.toml").write_text(common + TEXT[TEXT.index("[[") : TEXT.index("[export]")] + BOTH)
    done = pipeline("train", tmp_path)
    assert done.exit_code == 0, done.output
    ranks = {name: read_given_adapter(tmp_path / "run" / name / "train" / "adapter").settings["r"] for name in NAMES}
    assert ranks == {"sql": 16, "tone": 4, "combined": 20}
    sql, tone = (Layout(tmp_path / "run" / name) for name in ("sql", "tone"))
    rows = sum(len(batch["input_ids"]) for layout in (sql, tone) for batch in read_rows(layout.batches))
    assert judged(tmp_path) == ({PASS}, f"{rows} rows")
    batches = sql.batches.read_text()
    sql.batches.write_text(batches + batches)
    assert judged(tmp_path) == ({NOT_RUN}, "run/sql: train/batches.jsonl has changed since")
    sql.batches.write_text(batches)
    write_rows(tmp_path / "sql.jsonl", conversations(4, 8))
    again = pipeline("data", tmp_path, "--training", "sql")
    assert again.exit_code == 0, again.output
    assert judged(tmp_path) == ({NOT_RUN}, "run/sql: its data was made anew since")
    with pytest.raises(UserError, match=r"run/sql: convert is not made yet: run `pipeline export --as adapter"):
        together([tmp_path], None)
    with pytest.raises(UserError, match=r"run: holds runs .* \(combined, sql, tone\): give those that are meant, or"):
        together([tmp_path / "run"], None)

"""An adapter from elsewhere in the place of training: what a run makes of it, and what the command writes down."""

import json
import re
import shutil
from array import array
from pathlib import Path
from typing import Any

import pytest
from support.adapters import peft_adapter, small_base, trl_checkpoint
from support.commands import pipeline
from support.small_models import make_config, scratch

from pipeline.cli import resolved
from pipeline.data.token_file import TokenFile
from pipeline.errors import UserError
from pipeline.run.basis import settings_of
from pipeline.run.graph import Graph
from pipeline.run.stage import Task
from pipeline.stages import adapter, all_stages, data, declared, evaluate, merge
from pipeline.toml_file import load_config
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.chain import verify
from pipeline.verify.result import FAIL, PASS

QUESTIONS = [[{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}"}] for n in range(3)]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in QUESTIONS))
    return path


@pytest.fixture(scope="module")
def bare() -> Path:
    """By a PEFT script: every way of naming a rank, a scaling and a layer at once, and nothing but the adapter."""
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"model\.layers\.1\.mlp\.up_proj": 3}}
    return peft_adapter(scratch() / "bare", small_base(), use_dora=True, use_rslora=True, **patterns)


def sections(path: Path, **more: Any) -> dict[str, Any]:
    """A configuration's, as `load_config` completes it."""
    given = {"model": {"base": str(small_base())}, "adapter": {"path": path}, "data": {"train": None}}
    return {**given, "train": {"load_in_4bit": False, "max_length": 256}, **more}


def run_stage(stage: Any, run: Path, **settings: Any) -> dict[str, Any]:
    declaration = stage.STAGE
    output = run / declaration.name
    output.mkdir(parents=True)
    figures: dict[str, Any] = stage.main(Task(declaration, make_config(**settings), run, output, "", run / "scratch"))
    return figures


def judged(run: Path, settings: dict[str, Any], scratch: Path) -> dict[str, str]:
    seen = Task(declared("verify"), make_config(**settings), run, scratch).config  # no more than the stage declares
    artefacts = Artefacts.of_run(run, seen, scratch)
    content = verify(artefacts, ("train", "merge"), ("adapter", "labels", "weights", "merge_base"))
    assert {check["verdict"] for check in content["checks"]} > {PASS}
    return {check["id"]: check["verdict"] for check in content["checks"]}


def test_of_a_bare_script(bare: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", sections(bare)
    figures = run_stage(adapter, run, **settings)
    assert (figures["modules"], figures["rank"], figures["alpha"]) == (14, 8, 16)
    assert figures["base"] == str(small_base())
    run_stage(merge, run, **settings)
    verdicts = judged(run, settings, tmp_path)
    assert FAIL not in verdicts.values()
    assert verdicts["weights.merged"] == verdicts["adapter.fits"] == verdicts["adapter.same"] == PASS


def test_of_a_checkpoint_of_trl(questions: Path, tmp_path: Path) -> None:
    """With the rows that every rung is asked."""
    settings = sections(trl_checkpoint(), data={"train": None, "test": questions}, eval={"metric": "text"})
    run = tmp_path / "run"
    figures = run_stage(data, run, **settings)
    assert (figures["test_rows"], figures["train_rows"]) == (3, 0)
    assert run_stage(adapter, run, **settings)["trained_parameters"] > 0
    assert not list((run / "train").rglob("*.pt"))
    run_stage(merge, run, **settings)
    verdicts = judged(run, settings, tmp_path)
    assert FAIL not in verdicts.values()
    assert {"adapter.fits", "weights.merged", "adapter.prompt"} <= {i for i, v in verdicts.items() if v == PASS}


def test_4_bits_that_it_was_trained_on_are_measured_where_that_is_said(bare: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "run" / "data" / "validation.tokens.arrow"
    tokens.parent.mkdir(parents=True)
    with TokenFile(tokens) as file:
        file.add(*[array("i", range(40)).tobytes()] * 2)
    settings = sections(bare) | {"train": {"load_in_4bit": True, "max_length": 256}}
    run_stage(adapter, tmp_path / "run", **settings)
    figures = run_stage(merge, tmp_path / "run", **settings)
    assert figures["held_out_loss_16bit"] != figures["held_out_loss_dequantized"]
    verdicts = judged(tmp_path / "run", settings, tmp_path)
    assert verdicts["weights.merged"] == verdicts["weights.untouched"] == verdicts["merge_base.better"] == PASS


def test_several_in_one(tmp_path: Path) -> None:
    """What every later stage takes for one adapter; verify combines them again."""
    tables = [{"path": peft_adapter(tmp_path / "a", small_base(), r=4)}, {"path": trl_checkpoint(), "weight": 0.5}]
    settings = sections(Path(), adapters=tables, adapter={"combine": "svd"})
    run = tmp_path / "run"
    figures = run_stage(adapter, run, **settings)
    assert (figures["combined"], figures["rank"], figures["modules"]) == ("svd", 8, 14)
    run_stage(merge, run, **settings)
    verdicts = judged(run, settings, tmp_path)
    assert FAIL not in verdicts.values()
    assert verdicts["weights.merged"] == verdicts["adapter.fits"] == verdicts["adapter.same"] == PASS
    assert (
        judged(run, settings | {"adapters": [tables[0] | {"weight": 2.0}, tables[1]]}, tmp_path)["adapter.same"] == FAIL
    )


def test_each_adapter_and_the_combination_are_asked_the_questions_of_each(questions: Path, tmp_path: Path) -> None:
    """What was lost of one is seen: of its own rows those that it answers rightly alone, here all."""
    own = tmp_path / "own.jsonl"
    own.write_text("".join(questions.read_text().replace("Say", "Write").splitlines(keepends=True)[:2]))
    tables: list[dict[str, Any]] = [
        {"path": peft_adapter(tmp_path / "one", small_base()), "weight": -3.0, "test": questions},
        {"path": trl_checkpoint(), "name": "the other", "test": own},
    ]
    settings = sections(Path(), adapters=tables, adapter={}, eval={"metric": "text", "max_new_tokens": 4, "limit": 3})
    run, (one, other) = tmp_path / "run", ("alone-one", "alone-the-other")
    rungs = evaluate.STAGE.variants(make_config(**settings))
    assert rungs[:4] == ("base", one, other, "adapter")

    def ask(rung: str) -> dict[str, Any]:
        output = run / "evaluate" / rung
        output.mkdir(parents=True, exist_ok=True)
        task = Task(evaluate.STAGE, make_config(**settings), run, output, rung, run / "scratch")
        return dict(evaluate.main(task))

    run_stage(data, run, **settings)
    run_stage(adapter, run, **settings)
    rows = [json.loads(line) for line in (run / "data" / "test.jsonl").open()]
    assert [row["messages"][0]["content"].partition(" ")[0] for row in rows] == ["Say"] * 3 + ["Write"] * 2
    for rung, places in ((one, {0: 0, 1: 2, 2: 4}), (other, {3: 1, 4: 3})):  # they are asked in turn
        ask(rung)
        answers = [json.loads(line)["answer"] for line in (run / "evaluate" / rung / "answers.jsonl").open()]
        for row, place in places.items():
            rows[row]["messages"][-1]["content"] = answers[place]
    (run / "data" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = {rung: ask(rung) for rung in (one, other, "adapter", "table")}
    assert [figures[rung].get("correct") for rung in (one, other, "adapter")] == [3, 2, 0]
    table = figures["table"]
    assert (table["one alone"], table["one combined"], table["lost of one"]) == (1.0, 0.0, 3)
    assert json.loads((run / "evaluate/table/evaluation.json").read_text())["adapters"] == {
        "one": {"asked": 3, "rungs": {one: 1.0, other: 0.0, "adapter": 0.0}, "lost": [0, 2, 4]},
        "the-other": {"asked": 2, "rungs": {one: 0.0, other: 1.0, "adapter": 0.0}, "lost": [1, 3]},
    }


def test_rows_that_are_asked_for_one_adapter_and_for_all_are_counted_for_each(questions: Path, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    first, own = (Path(shutil.copy(questions, tmp_path / "all" / f"{name}.jsonl")) for name in ("first", "own"))
    tables = [{"path": peft_adapter(tmp_path / "one", small_base()), "name": "one", "test": own}]
    rows = len(first.read_text().splitlines())
    both = {"data": {"train": None, "test": first.parent}, "eval": {"limit": rows}}
    figures = run_stage(data, tmp_path / "run", **sections(Path(), adapters=tables, adapter={}, **both))
    assert figures["test_rows"] == 3 * rows


def test_an_adapter_of_a_run_has_the_questions_of_that_run(bare: Path, tmp_path: Path, questions: Path) -> None:
    run = tmp_path / "other" / "run"
    (run / "data").mkdir(parents=True)
    shutil.copy(questions, run / "data" / "test.jsonl")
    shutil.copytree(bare, run / "train" / "adapter")
    text = f'[model]\nbase = "{small_base()}"\n[[adapters]]\npath = "other/run/train/adapter"\nname = "a"\n{ALONE}'
    config, _ = load_config(project(tmp_path, text))
    assert config.tests == {"a": run / "data" / "test.jsonl"}
    assert load_config(tmp_path / "pipeline.toml", [f"data.test={questions}"])[0].tests == {"": questions}
    with pytest.raises(UserError, match=r"toml:3: adapters: .*nowhere.jsonl: no such file"):
        load_config(project(tmp_path, text + 'test = "nowhere.jsonl"\n'))


def project(folder: Path, text: str) -> Path:
    path = folder / "pipeline.toml"
    path.write_text(text)
    return path


def test_a_configuration_with_an_adapter_has_no_training(bare: Path, tmp_path: Path, questions: Path) -> None:
    text = f'[model]\nbase = "{small_base()}"\n[adapter]\npath = "{bare}"\n'
    config, sources = resolved(project(tmp_path, text), ())
    assert config.data.train is None
    assert not config.train.load_in_4bit
    assert sources["train.load_in_4bit"] == "default with adapter.path"
    graph = Graph(all_stages(config))
    names = [str(node) for node in graph.nodes(config)]
    assert names == ["preflight", "train", "merge", "convert", "quantize/q4_k_m", "modelfile/q4_k_m", *names[6:]]
    assert graph.stages["train"].summary == adapter.STAGE.summary
    assert settings_of(graph.stages["train"], "", config)["model.base"] == small_base().name
    told = pipeline("data", tmp_path)
    assert (told.exit_code, told.stderr) == (0, "data: nothing to do under this configuration\n")
    config, _ = resolved(tmp_path, [f"data.test={questions}"])
    assert [str(node) for node in graph.nodes(config)][:3] == ["preflight", "data", "train"]


ALONE, OTHER = '[[adapters]]\npath = "."\n', '[[adapters]]\npath = ".."\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[adapter]\npath = "nowhere"\n', "pipeline.toml:4: adapter.path: .*nowhere: no such folder"),
        ('[adapter]\npath = "."\n[data]\ntrain = "x.jsonl"\n', "pipeline.toml:6: data.train: nothing is trained with"),
        ("[adapter]\npath = 3\n", "adapter.path = 3"),
        ('[[adapters]]\npath = "nowhere"\n', "pipeline.toml:3: adapters: .*nowhere: no such folder"),
        (
            '[[adapters]]\npath = "."\nweight = "much"\n',
            "pipeline.toml:3: adapters: weight = 'much': input should be a",
        ),
        ('[[adapters]]\npath = "."\nweight = nan\n', "pipeline.toml:3: adapters: weight = nan: input should be"),
        ('[[adapters]]\npath = "."\nweight = 0.0\n', "pipeline.toml:3: adapters: .*: weight = 0 leaves nothing of it"),
        (
            '[[adapters]]\npath = "."\nwieght = 1.0\n',
            "adapters: wieght: unknown key; known are: path, training, weight, name, test",
        ),
        ("[[adapters]]\nweight = 1.0\n", "adapters: path: must be given"),
        ('[[adapters]]\npath = "."\n[adapter]\npath = "."\n', "adapter.path and .* exclude each other"),
        (
            f"{ALONE}[adapter]\ncombine = 'ties'\n",
            'pipeline.toml:6: adapter.combine = "ties" needs two .* there is one',
        ),
        (f"{ALONE}{OTHER}[adapter]\ncombine = 'ties'\n", "needs adapter.density"),
        (f"{ALONE}{OTHER}[adapter]\ndensity = 0.5\n", '"cat" knows no density'),
        (f"{ALONE}{OTHER}[adapter]\nrank = 4\n", 'adapter.rank is for "svd"'),
        (f"{ALONE}{ALONE}", "two of them have the path"),
        (f'{ALONE}name = "x"\n{OTHER}name = "x"\n', "two of them have the name x: give each a name of its own"),
        ('[data]\ntrain = "x.jsonl"\n[adapter]\ncombine = "svd"\n', "adapter.combine says how .* there are none"),
        (
            '[data]\ntrain = "."\n[train]\nfrom_adapter = "x"\n',
            "toml:6: train.from_adapter: .*/x: no such folder",
        ),
        ('[adapter]\npath = "."\n[train]\nfrom_adapter = "."\n', "train.from_adapter: nothing is trained with"),
        ("[adapter]\n", "data: must be given"),
    ],
)
def test_what_does_not_go_with_it(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(project(tmp_path, f'[model]\nbase = "{small_base()}"\n{text}'))


def test_what_a_folder_shows_by_itself_is_said_with_the_configuration(tmp_path: Path) -> None:
    """Before the base is looked for, by every command."""
    for name in ("empty", "mlx"):
        (tmp_path / name).mkdir()
    (tmp_path / "mlx" / "adapters.safetensors").touch()
    base = f'[model]\nbase = "{small_base()}"\n'
    (tmp_path / "x.jsonl").touch()
    for text, said in (
        (
            '[data]\ntrain = "x.jsonl"\n[train]\nfrom_adapter = "empty"\n',
            "toml:6: train.from_adapter: .*holds no adapter",
        ),
        ('[adapter]\npath = "mlx"\n', "toml:4: adapter.path: .*an adapter of MLX"),
        ('[[adapters]]\npath = "empty"\n', "toml:3: adapters: .*holds no adapter"),
    ):
        told = pipeline("config", project(tmp_path, base + text))
        assert told.exit_code == 2
        assert re.search(said, told.stderr), told.stderr


def test_the_command_writes_a_configuration(
    bare: Path, tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr("pipeline.cli.bring_up_to_date", lambda config, sources, names: asked.extend(names))
    command = ["export", "--adapter", str(bare), "--quant", "q8_0", "--data", questions.name, "--template", "chatml"]
    for _ in range(2):  # what it wrote itself, it replaces
        told = pipeline(*command)
        assert told.exit_code == 0, told.output
    config, _ = load_config(tmp_path / "bare-export" / "pipeline.toml")
    assert asked == ["modelfile"] * 2
    assert (config.model.base, config.model.chat_template) == (str(small_base()), "chatml")
    assert (config.adapter.path, config.data.test) == (bare, questions)
    assert (config.export.quant, config.ollama.name) == (("q8_0",), "bare")
    (tmp_path / "bare-export" / "pipeline.toml").write_text("# mine\n")
    assert "was not written by this command" in pipeline(*command).stderr
    several = [
        "export",
        "--adapter",
        str(bare),
        "--adapter",
        str(trl_checkpoint()),
        "--weight",
        "0.5",
        "--weight",
        "-1",
    ]
    told = pipeline(*several, "--combine", "ties", "--density", "0.4")
    assert told.exit_code == 0, told.output
    config, _ = load_config(tmp_path / "bare-trl-checkpoint-2-export" / "pipeline.toml")
    assert [(given.path, given.weight) for given in config.adapters] == [(bare, 0.5), (trl_checkpoint(), -1.0)]
    assert (config.adapter.combine, config.adapter.density) == ("ties", 0.4)
    assert "one for each" in pipeline(*several, "--weight", "1").stderr
    told = pipeline(*several, *("--data", questions.name) * 2)
    assert told.exit_code == 0, told.output
    config, _ = load_config(tmp_path / "bare-trl-checkpoint-2-export" / "pipeline.toml")
    assert config.tests == {"bare": questions, "checkpoint-2": questions}
    assert "one for all, or one for each" in pipeline(*several, *("--data", "x") * 3).stderr
    assert "belong to --adapter" in pipeline("export", "--base", "x").stderr
    assert "in the place of CONFIG" in pipeline("export", "x.toml", "--adapter", bare).stderr
    assert "no such folder" in pipeline("export", "--adapter", "nowhere").stderr

"""The page and `status`: what the manifest has of a run, written for a person."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support import good_run, small_models
from support.commands import pipeline
from support.page import Page

from pipeline import plots
from pipeline.stages import judged_stages, report
from pipeline.verify import chain
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import FAIL, NOT_RUN, PASS, Claim, document, write

STAGES = ("data", "train", "quantize/q4_k_m", "evaluate/table")
HOSTILE = (
    "<script>alert(1)</script> \"><img src=x onerror=alert(1)> ' onmouseover='x &amp; &lt;b&gt; & {{ 7 * 7 }} {% raw "
    "%} {# </style><style>*{display:none}</style></title></body> <!-- ]]> <? $\\frac{$ \u2028\u2029 \u202ecba\u200f end"
)


def made_up(folder: Path, text: Callable[[str], str] = str, *, gpu: bool = False) -> Path:
    """A run's folder with all that the page and `status` read of it. `text` makes each text of its place's name."""
    run = folder / "run"
    for part in ("train", "evaluate/table", "deploy", "verify"):
        (run / part).mkdir(parents=True)
    record = {
        **small_models.RECORD,
        "figures": {"bytes": 145_000_000, "device": text("figure"), "type": text("type"), text("key"): 0.5},
        "warnings": [text("warning")],
        "outputs": {f"{text('file')}.gguf": {"size": 145_000_000, "mtime_ns": 1, "sha256": "5f" * 32}},
    }
    used_gpu = {**record, "figures": {"peak_gpu_bytes": 9_800_000_000}}
    manifest = {
        "nodes": [*STAGES, "report"],
        "stages": dict.fromkeys(reversed(STAGES), record) | ({"train": used_gpu} if gpu else {}) | {"report": record},
        "machine": {"system": text("system"), "cores": 2, "memory_bytes": 8_000_000_000},
        "versions": {text("package"): text("version")},
        "pins": {text("pin"): {"commit": text("commit")}},
        "config": {"values": {"data": {"system": text("value")}}, "sources": {"data.system": text("source")}},
    }
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    plots.loss_curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], run / "train" / "loss.svg")
    rungs = {name: {"exact_match": 0.5, "interval_95": [0.4, 0.6]} for name in ("base", text("rung"))}
    answers = {text("rung"): text("answer"), "base": "base's answer"}
    row = {
        "messages": [{"role": "user", "content": text("question")}],
        "expected": text("expected"),
        "answers": answers,
        "correct": dict(zip(answers, (True, False), strict=True)),
    }
    adapters = {text("adapter"): {"asked": 7, "rungs": {"base": 0.125}, "lost": [3, 4]}}
    evaluation = {"rungs": rungs, "adapters": adapters, "rows": [row]}
    (run / "evaluate" / "table" / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    deployed = {"deployed": True, "models": [{"name": text("served")}]}
    (run / "deploy" / "deploy.json").write_text(json.dumps(deployed), encoding="utf-8")
    claim = Claim(text("id"), "merge", text("sentence"))
    checks = [
        claim.holds(True, "", text("figure of a check"), text("threshold")),
        claim.holds(False, text("words"), [text("in a list")]),
        claim.not_run(text("why")),
    ]
    write(run / "verify" / "verify.json", document(checks, ("merge",), divergences={"convert": 1e-6}))
    return run


def page_of(run: Path, **sections: Any) -> Page:
    task = small_models.make_task(run, "report", **sections)
    report.main(task)
    return Page.of(task.output / "report.html")


def named(text: Callable[[str], str]) -> dict[str, Any]:
    return {
        "model": {"base": text("base")},
        "ollama": {"name": text("name")},
        "export": {"quant": ["q4_k_m"]},
        "lora": {"r": 16},
    }


def test_no_text_of_a_run_becomes_markup_and_every_one_is_there(tmp_path: Path) -> None:
    """The same page with harmless texts has the same elements and attributes, in the same order."""
    places: set[str] = set()

    def hostile(place: str) -> str:
        places.add(place)
        return f"{place} {HOSTILE}"

    harmless = page_of(made_up(tmp_path / "harmless"), **named(str))
    page = page_of(made_up(tmp_path / "hostile", hostile), **named(hostile))

    def without_pictures(page: Page) -> list[Any]:
        return [(tag, [pair for pair in attributes if pair[0] != "src"]) for tag, attributes in page.elements]

    assert without_pictures(page) == without_pictures(harmless)
    assert "adapter (7)" in harmless.text
    assert "0.125" in harmless.text
    # A value of the configuration is shown as JSON, with quotation marks of its own.
    assert json.dumps(hostile("value"), ensure_ascii=False) in page.text
    assert {place for place in [*places] if hostile(place) not in page.text} == {"value"}


def test_the_charts_are_images_in_which_texts_are_texts(tmp_path: Path) -> None:
    name = f"rung {HOSTILE}"
    page = page_of(made_up(tmp_path, lambda place: f"{place} {HOSTILE}"))
    ladder, loss = page.pictures()
    for picture in (ladder, loss):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(picture).iter()}
        assert tags & {"text", "path"}
        assert not tags & {"script", "img", "image", "foreignObject", "a"}
    assert name in [element.text for element in ElementTree.fromstring(ladder).iter()]


def test_the_proof_s_table_has_the_verdicts_of_real_checks(tmp_path: Path) -> None:
    """A good run is held against a limit that no quantized file keeps; without answers some checks cannot run."""
    run = good_run.copy_run(tmp_path)
    config = good_run.config_of(run)
    strict = config.model_copy(update={"verify": config.verify.model_copy(update={"quantization_error": 1e-9})})
    artefacts = Artefacts.of_run(run, strict, tmp_path)
    content = chain.verify(artefacts, judged_stages(), ("labels", "quantization", "answers"))
    assert all(content["counts"].values()), content["counts"]
    write(made_up(tmp_path / "page") / "verify" / "verify.json", content)
    page = page_of(tmp_path / "page" / "run")

    head, *rows = page.tables["Proof"]
    assert head == ["verdict", "stage", "claim", "figure", "threshold"]
    assert [(row[0], row[1]) for row in rows] == [(check["verdict"], check["stage"]) for check in content["checks"]]
    for row, check in zip(rows, content["checks"], strict=True):
        assert row[2] == f"{check['sentence']} {check['id']}{check['words']}"
        assert (row[3] == "") == (check["figure"] is None)
        assert (row[4] == "") == (check["threshold"] is None)
    broken = next(row for row in rows if row[0] == FAIL)
    assert broken[4] == "at most 1e-09"
    assert float(broken[3]) > 0.01
    first = content["first_broken"]
    assert first["id"] == "quantization.error"
    assert f"The first broken stage is quantize/q4_k_m: {first['words']}" in page.text


def test_a_proof_without_a_failure_says_how_much_was_checked(tmp_path: Path) -> None:
    run = made_up(tmp_path)
    claim = Claim("weights.merged", "merge", "the sum is right")
    write(
        run / "verify" / "verify.json",
        document([claim.holds(True), claim.holds(True), claim.not_run("no disk")], ("merge",)),
    )
    page = page_of(run)
    assert "Every link that was checked holds: 2 checks passed, 1 did not run." in page.text
    assert [row[0] for row in page.tables["Proof"][1:]] == [PASS, PASS, NOT_RUN]


def test_answers_are_shown_with_their_verdict_and_long_ones_are_shortened_in_words(tmp_path: Path) -> None:
    run = made_up(tmp_path)
    path = run / "evaluate" / "table" / "evaluation.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["rows"][0]["answers"]["base"] = "a" * 1500
    document["rows"].append(document["rows"][0] | {"correct": {"rung": None, "base": None}})
    path.write_text(json.dumps(document), encoding="utf-8")
    rows = page_of(run).tables["Answers side by side"][1:]
    long = "a" * 400 + "… (1,100 more characters)"
    assert rows == [
        ["questionexpected expected", "rung", "answer", "right"],
        ["base", long, "wrong"],
        ["questionexpected expected", "rung", "answer", ""],
        ["base", long, ""],
    ]


def test_what_is_no_part_of_the_run_any_more_is_not_shown(tmp_path: Path) -> None:
    """Answers of a time when there was test data, types that are no longer named, and what a former page cost."""
    run = made_up(tmp_path)
    page = page_of(run)
    assert [row[0] for row in page.tables["Stages"][1:]] == list(STAGES)
    assert "8.0 s" in page.text  # four stages of 2 s
    assert {"Before and after", "Answers side by side"} <= page.tables.keys()
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    manifest["nodes"] = ["data", "train", "quantize/q4_k_m"]
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    page = page_of(run)
    assert [row[0] for row in page.tables["Stages"][1:]] == manifest["nodes"]
    assert not {"Before and after", "Answers side by side"} & page.tables.keys()
    assert len(page.pictures()) == 1


@pytest.mark.parametrize("gpu", [False, True])
def test_the_page_shows_a_gpu_s_peak_memory_where_there_is_one(tmp_path: Path, gpu: bool) -> None:
    page = page_of(made_up(tmp_path, gpu=gpu))
    cards = list(zip(page.texts, page.texts[1:], strict=False))
    assert ("2.1 GB", "peak memory") in cards
    assert (("9.8 GB", "peak GPU memory") in cards) == gpu
    memory = {row[0]: row[2] for row in page.tables["Stages"][1:]}
    assert memory.pop("train") == ("2.1 GB, GPU 9.8 GB" if gpu else "2.1 GB")
    assert set(memory.values()) == {"2.1 GB"}
    assert page.text.count("GPU") == (2 if gpu else 0)


@pytest.mark.parametrize("gpu", [False, True])
def test_status_shows_a_gpu_s_peak_memory_where_there_is_one(tmp_path: Path, gpu: bool) -> None:
    made_up(tmp_path, gpu=gpu)
    (tmp_path / "train.jsonl").touch()
    config = tmp_path / "pipeline.toml"
    config.write_text('[model]\nbase = "smollm2-135m-instruct"\n[data]\ntrain = "train.jsonl"\n')
    shown = pipeline("status", config, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("2.1 GB, GPU 9.8 GB") == gpu

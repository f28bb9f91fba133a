"""The real chain, short: a base, a few steps of training, a Q4_K_M file, and Ollama answering with it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.page import Page

HOME = Path(__file__).parent.parent / "examples" / "home"
STAGES = [
    "preflight",
    "data",
    "train",
    "merge",
    "convert",
    "quantize/q4_k_m",
    "modelfile/q4_k_m",
    "deploy",
    "evaluate/base",
    "evaluate/adapter",
    "evaluate/adapter-16bit",
    "evaluate/merged",
    "evaluate/gguf-16bit",
    "evaluate/q4_k_m",
    "evaluate/ollama",
    "evaluate/table",
    "verify",
]


def pipeline(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the example, cut down to 10 steps of 2 rows."""
    project = tmp_path_factory.mktemp("home")
    for name, rows in (("train", 40), ("validation", 8), ("test", 4)):
        lines = (HOME / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (project / f"{name}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    text = (HOME / "pipeline.toml").read_text(encoding="utf-8")
    for setting in ("steps = 10", "batch = 2"):
        text, found = re.subn(rf"^{setting.split()[0]} = .*$", setting, text, flags=re.MULTILINE)
        assert found
    # So few steps teach it the shape of an answer, and leave it unsure of what stands in it.
    text += "\n[verify]\nstopping = 0\nloss_lost = 2\nanswers_lost = 1\ntokens = 250\nstrings = 300\n"
    text += "stopping_prompts = 2\n"
    (project / "pipeline.toml").write_text(text, encoding="utf-8")
    answer = pipeline("run", project)
    assert answer.returncode == 0, answer.stderr
    assert "Traceback" not in answer.stderr
    return project / "run"


def manifest(run: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return document


def test_every_stage_ran_and_is_recorded(run: Path) -> None:
    document = manifest(run)
    assert set(STAGES) <= set(document["stages"])
    for name, record in document["stages"].items():
        assert record["outputs"], name
        for file, known in record["outputs"].items():
            assert (run / file).stat().st_size == known["size"]
    assert document["pins"]["llama.cpp"]["sha256"]
    assert document["versions"]["unsloth"]
    words = [word for command in document["stages"]["convert"]["commands"] for word in command]
    assert any(word.endswith("convert_hf_to_gguf.py") for word in words)
    assert not list((run / ".partial").iterdir())


def test_it_learned_and_the_merge_changed_the_weights(run: Path) -> None:
    stages = manifest(run)["stages"]
    assert stages["train"]["figures"]["validation_loss_kept"] < stages["train"]["figures"]["validation_loss_first"]
    assert stages["merge"]["figures"]["modules_merged"] == 210
    assert stages["merge"]["figures"]["relative_change"] > 0


def test_ollama_answers_what_the_file_answers(run: Path) -> None:
    deployed = json.loads((run / "deploy" / "deploy.json").read_text(encoding="utf-8"))
    assert deployed["deployed"]
    rows = json.loads((run / "evaluate" / "table" / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 4
    for row in rows:
        assert row["answers"]["ollama"] == row["answers"]["q4_k_m"]
        assert row["answers"]["base"] != row["answers"]["q4_k_m"]


def test_the_base_went_the_whole_way_first(run: Path) -> None:
    content = json.loads((run / "preflight" / "preflight.json").read_text(encoding="utf-8"))
    assert content["verdict"] == "pass"
    passed = {(row["id"], row["stage"]) for row in content["checks"] if row["verdict"] == "pass"}
    assert passed >= {
        *(("machine.disk", "base"), ("machine.memory", "base"), ("machine.versions", "base")),
        *(("weights.reload", "base"), ("weights.finite", "base"), ("toolchain.pin", "convert")),
        *(
            ("preflight.rope", "convert"),
            ("preflight.convert", "convert"),
            ("preflight.template", "modelfile"),
            ("preflight.served", "deploy"),
        ),
        *(("tokenizer.ids", "convert"), ("tokenizer.ids", "quantize/q4_k_m"), ("prompt.llamacpp", "quantize/q4_k_m")),
        *(("logits.mean", "convert"), ("logits.quantized", "quantize/q4_k_m")),
        ("quantization.types", "quantize/q4_k_m"),
    }


def test_every_link_is_proven(run: Path) -> None:
    proof = json.loads((run / "verify" / "verify.json").read_text(encoding="utf-8"))
    assert proof["verdict"] == "pass"
    assert proof["counts"]["not run"] == 0
    assert {check["id"].partition(".")[0] for check in proof["checks"]} >= {
        *("labels", "weights", "tokenizer", "prompt", "logits"),
        *("quantization", "stopping", "merge_base", "answers", "toolchain"),
    }


def test_talking_to_every_rung(run: Path) -> None:
    """Each is given the system text that was trained, and so begins its answer as the others do."""
    question = ("--message", "turn on the kitchen light")
    answers = [pipeline("chat", run.parent, *question).stdout]
    told = pipeline("chat", run, "--gguf", "--adapter", "--compare", *question)
    assert told.returncode == 0, told.stderr
    compared = re.fullmatch(r"gguf: (.*)\nadapter: (.*)\n", told.stdout, re.DOTALL)
    assert compared, told.stdout
    assert ("(the same answer)" if compared[1] == compared[2] else "(they part at character") in told.stderr
    answers += compared.groups()
    assert len({answer[:8] for answer in answers}) == 1, answers


def test_the_page_is_whole_and_needs_nothing_else(run: Path) -> None:
    page = Page.of(run / "report" / "report.html")
    assert page.elements[-1][0] == "td"  # of the last table
    assert len(page.pictures()) == 2  # the ladder and the losses
    addresses = [value for _, attributes in page.elements for name, value in attributes if name in ("src", "href")]
    assert all(address and address.startswith("data:image/svg+xml;base64,") for address in addresses)
    assert [row[0] for row in page.tables["Stages"][1:]] == STAGES
    assert [row[0] for row in page.tables["Before and after"][1:]] == [
        *("base", "adapter", "adapter-16bit", "merged", "gguf-16bit", "q4_k_m", "ollama"),
    ]
    assert len(page.tables["Answers side by side"]) == 1 + 4 * 7
    page.shows_the_proof(run)


def test_again_skips_everything_and_another_type_runs_only_what_follows(run: Path) -> None:
    again = pipeline("run", run.parent)
    assert again.returncode == 0, again.stderr
    count = len(manifest(run)["stages"])
    assert f"{count} of {count} stages are up to date" in again.stderr
    before = manifest(run)["stages"]
    more = pipeline("export", run.parent, "--quant", "q8_0")
    assert more.returncode == 0, more.stderr
    after = manifest(run)["stages"]
    changed = {name for name, record in after.items() if record != before.get(name)}
    assert changed == {"quantize/q8_0", "modelfile/q8_0"}
    assert (run / "modelfile" / "q8_0" / "Modelfile").is_file()
    rows = json.loads(pipeline("status", run.parent, "--json").stdout)["stages"]
    assert {row["state"] for row in rows} == {"fresh"}

"""merge.keep = false: what is proven before the merged weights go, and what can still be said without them."""

import json
import shutil
from pathlib import Path

import pytest
from support.good_run import artefacts, config_of, copy_run
from support.small_models import RECORD

from pipeline.errors import PipelineError
from pipeline.run.folder import write_manifest
from pipeline.run.layout import Layout
from pipeline.run.stage import Task
from pipeline.stages import convert
from pipeline.verify import answers, logits, token_ids, toolchain, weights
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import FAIL, NOT_RUN, PASS

WHY = "merge.keep = false"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that is to keep no merged weights, before `convert`."""
    run = copy_run(tmp_path)
    shutil.rmtree(run / "convert")
    values = json.loads((run / "config.json").read_text()) | {"merge": {"base": "16bit", "keep": False}}
    (run / "config.json").write_text(json.dumps(values))
    return run


def do(run: Path) -> None:
    output = run / "convert"
    output.mkdir()
    convert.main(Task(convert.STAGE, config_of(run), run, output, "", run / "scratch"))


def test_what_verify_cannot_say_later_is_proven_first(run: Path) -> None:
    do(run)
    layout = Layout(run)
    proof = json.loads(layout.proof.read_text())
    proven = {check["id"] for check in proof["checks"] if check["verdict"] == PASS}
    assert {check["verdict"] for check in proof["checks"]} == {PASS}
    patterns = convert.STAGE.removes(config_of(run))["merge"]
    for path in [path for pattern in patterns for path in layout.node("merge").glob(pattern)]:
        path.unlink()
    for path in [path for path in (run / "scratch").rglob("*") if path.is_file()]:
        path.unlink()

    found = Artefacts.of_run(run, config_of(run), run / "scratch")
    found.held_out = "the conformance suite", found.held_out[1][:6]
    results = [
        *weights.check(found), *token_ids.check(found), *logits.check(found), *answers.check(found),
    ]  # fmt: skip
    assert not [result for result in results if result.verdict == FAIL]
    gone = {result.id for result in results if result.verdict == NOT_RUN and result.words == WHY}
    assert gone - {"weights.reload", "answers.merged"} <= proven
    assert "weights.gguf" in gone
    judged = {result.id for result in results if result.verdict == PASS}
    assert judged >= {"weights.file", "weights.metadata", "tokenizer.model", "logits.mean", "logits.quantized"}


def test_what_is_not_proven_ends_the_stage(run: Path) -> None:
    model = Layout(run).merged_model / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.unlink()
    model.write_bytes(data)
    with pytest.raises(PipelineError, match=r"the first broken stage is merge: weights\.(merged|untouched)"):
        do(run)
    assert json.loads(Layout(run).proof.read_text())["verdict"] == FAIL


def test_a_removed_file_is_no_missing_one(run: Path) -> None:
    name = "merge/model/model.safetensors"
    (run / name).unlink()
    recorded = {name: {"size": 1, "mtime_ns": 1, "sha256": ""}}
    for more, verdict in (({}, FAIL), ({"removed": True}, PASS)):
        outputs = {name: recorded[name] | more}
        write_manifest(run, {"stages": {"merge": RECORD | {"judged": True, "outputs": outputs}}})
        (result,) = (result for result in toolchain.check(artefacts(run)) if result.id == "toolchain.files")
        assert result.verdict == verdict

"""The base an adapter is merged into: both are measured, the better is taken, and the merge is exact on either."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.good_run import CONFIG, good_run
from support.small_models import base_folder, make_config, make_task

from pipeline.model.held_out import held_out_losses, mean_loss
from pipeline.model.load import load_float32
from pipeline.model.nf4 import dequantized
from pipeline.model.weights_file import read_weights
from pipeline.stages import merge
from pipeline.verify import merge_base, weights
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.reconvert import reconvert
from pipeline.verify.result import FAIL, PASS


def merged(
    folder: Path, base: str, targets: Sequence[str] = (), *, way: str = "tensors", **train: Any
) -> tuple[Artefacts, dict[str, Any]]:
    """The good run with its adapter, or the part of it for some modules, merged anew; and base.json."""
    run = folder / "run"
    for stage in ("data", "train", "base"):
        shutil.copytree(good_run() / stage, run / stage)
    if targets:
        leave_only(run / "train" / "adapter", targets)
    sections = {**CONFIG, "model": {"base": str(run / "base")}, "merge": {"base": base, "way": way}}
    sections["train"] = {**CONFIG["train"], **train}
    merge.main(make_task(run, "merge", **sections))
    return Artefacts.of_run(run, make_config(**sections), folder), json.loads((run / "merge" / "base.json").read_text())


def leave_only(adapter: Path, targets: Sequence[str]) -> None:
    """An adapter as if only these modules had been trained."""
    weights = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if any(f".{target}." in name for target in targets)}
    assert 0 < len(kept) < len(weights)
    save_file(kept, adapter / "adapter_model.safetensors", {"format": "pt"})
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": list(targets)}))


def test_modules_without_an_adapter_were_4_bit_too(tmp_path: Path) -> None:
    artefacts, _ = merged(tmp_path, "dequantized", targets=("q_proj", "v_proj"))
    results = {result.id: result for result in weights.check_merge(artefacts)}
    assert artefacts.base is not None
    assert {result.verdict for result in results.values()} == {PASS}
    base, result = read_weights(artefacts.base), read_weights(artefacts.model)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(result[name], dequantized(base[name]).to(result[name].dtype))
    assert not torch.equal(result[name], base[name])


@pytest.mark.parametrize("wanted", ["auto", "16bit", "dequantized"])
def test_what_is_measured_is_what_is_merged(tmp_path: Path, wanted: str) -> None:
    artefacts, chosen = merged(tmp_path, wanted)
    losses, taken = chosen["losses"], chosen["taken"]
    if wanted == "auto":
        assert losses.keys() == {"base", "16bit", "dequantized"}
        assert losses["16bit"] != losses["dequantized"]
        assert taken == min(("16bit", "dequantized"), key=lambda name: losses[name])
    else:
        assert (taken, losses, chosen["row_losses"]) == (wanted, {}, {})

    results = {result.id: result for result in weights.check_merge(artefacts)}
    assert {result.verdict for result in results.values()} == {PASS}
    assert results["weights.merged"].figure <= 0.5  # rounded once, to the nearest

    if wanted != "auto":
        return
    losses = artefacts.merge_losses  # on the rows that are compared
    loss = mean_loss(held_out_losses(load_float32(artefacts.model), artefacts.compared_rows(), lambda done: None))
    other = "dequantized" if taken == "16bit" else "16bit"
    assert abs(loss - losses[taken]) < 0.05 * abs(losses[other] - losses[taken])


def test_both_ways_leave_the_same(tmp_path: Path) -> None:
    """Files, choice and figures: PEFT's merge of the loaded model is the measure for the one from file to file."""
    own, chosen = merged(tmp_path / "tensors", "auto")
    theirs, by_peft = merged(tmp_path / "peft", "auto", way="peft")
    assert chosen["taken"] == by_peft["taken"]
    for name, loss in chosen["losses"].items():
        assert loss == pytest.approx(by_peft["losses"][name], rel=1e-6)
    weights_file = "model.safetensors"
    assert (own.model / weights_file).read_bytes() == (theirs.model / weights_file).read_bytes()
    assert {path.name for path in own.model.iterdir()} == {path.name for path in theirs.model.iterdir()}
    (tmp_path / "again").mkdir()
    files = [reconvert(artefacts.model, folder(tmp_path / "again" / name), "f16").path
             for name, artefacts in (("tensors", own), ("peft", theirs))]  # fmt: skip
    assert files[0].read_bytes() == files[1].read_bytes()


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_worse_base_is_named(tmp_path: Path) -> None:
    artefacts, chosen = merged(tmp_path, "auto")
    worse = {"16bit": "dequantized", "dequantized": "16bit"}[chosen["taken"]]
    artefacts.merged_into = worse
    difference = artefacts.merge_losses[worse] - artefacts.merge_losses[chosen["taken"]]
    artefacts.settings = artefacts.settings.model_copy(update={"loss_lost": difference / 2})
    (result,) = merge_base.check(artefacts)
    assert (result.id, result.stage, result.verdict) == ("merge_base.better", "merge", FAIL)
    assert '"auto"' in result.words


def test_an_adapter_of_16_bits_has_one_base(tmp_path: Path) -> None:
    artefacts, chosen = merged(tmp_path / "auto", "auto", load_in_4bit=False)
    assert chosen["taken"] == "16bit"
    assert not chosen["losses"]
    (result,) = merge_base.check(artefacts)
    assert result.verdict == "not run"


def test_a_chosen_base_is_merged_without_loading_a_model(tmp_path: Path) -> None:
    """What takes seconds to import is left alone, so the stage costs what its files cost."""
    for stage in ("data", "train", "base"):
        shutil.copytree(good_run() / stage, tmp_path / "run" / stage)
    sections = {**CONFIG, "model": {"base": str(tmp_path / "run" / "base")}, "merge": {"base": "16bit"}}
    program = (
        "import json, sys; from pathlib import Path; from support.small_models import make_task\n"
        "from pipeline.stages import merge\n"
        f"merge.main(make_task(Path({str(tmp_path / 'run')!r}), 'merge', **json.loads({json.dumps(sections)!r})))\n"
        "print(sorted({'transformers', 'peft', 'bitsandbytes', 'accelerate', 'unsloth'} & sys.modules.keys()))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
    assert read_weights(tmp_path / "run" / "merge" / "model").shapes


def test_verify_may_read_which_base_was_chosen(tmp_path: Path) -> None:
    """Through what its stage sees of the configuration."""
    config = make_task(tmp_path, "verify", merge={"base": "16bit"}).config
    artefacts = Artefacts(config.verify, base_folder(), None, {}, tmp_path, config=config, run=tmp_path)
    (said,) = merge_base.check(artefacts)
    assert said.words == "nothing was measured: merge.base says so"

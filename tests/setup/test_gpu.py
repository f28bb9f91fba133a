"""What training on a GPU needs, with made-up answers of nvidia-smi: the program is a script that prints them."""

import os
import re
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.figures import GIB
from pipeline.run.provenance import machine
from pipeline.setup import gpu, libraries
from pipeline.setup.machine_findings import FAILURE, OK, WARNING, Finding, require

UUID = "GPU-{0}a5b6c7d-0000-1111-2222-33333333333{0}"
GOOD = "NVIDIA GeForce RTX 4090, 24564, 580.82.07, 8.9"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the made-up nvidia-smi is; a machine without a driver of its own."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "nvidia-smi"


def answers(smi: Path, *cards: str, status: int = 0) -> None:
    """Have it print these cards: "name, memory, driver, capability" each, or any other line."""
    lines = [f"{UUID.format(number)}, {with_mode(card)}" if "," in card else card for number, card in enumerate(cards)]
    smi.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {status}\n")
    smi.chmod(0o755)


def with_mode(card: str, mode: str = "[N/A]") -> str:
    """The line of a card that cannot be split, or is ("Enabled")."""
    rest, _, capability = card.rpartition(", ")
    return f"{rest}, {mode}, {capability}"


def found(torch: str | None = None) -> dict[str, Finding]:
    return {finding.subject: finding for finding in gpu.look(gpu.gpus(), 13, torch)}


def test_card_that_serves_is_ok(smi: Path) -> None:
    answers(smi, GOOD)
    assert {finding.state for finding in found("2.14.1").values()} == {OK}
    assert found()["GPU"].found == "NVIDIA GeForce RTX 4090, 24 GiB"
    assert gpu.memory() == 24564 * 2**20
    require(found().values(), "never")


def test_a_run_records_the_card_and_its_driver(smi: Path) -> None:
    answers(smi, GOOD)
    (card,) = machine()["gpus"]
    assert (card["name"], card["driver"], card["capability"]) == ("NVIDIA GeForce RTX 4090", "580.82.07", (8, 9))


@pytest.mark.parametrize(
    ("driver", "cuda", "state"),
    [
        ("580.65.06", 13, OK),
        ("580.65.05", 13, FAILURE),
        ("575.64.03", 13, FAILURE),
        ("610.10", 13, OK),
        ("535.54.03", 12, OK),
        ("[N/A]", 13, WARNING),
    ],
)
def test_driver_has_to_run_the_locked_cuda(smi: Path, driver: str, cuda: int, state: str) -> None:
    answers(smi, f"NVIDIA L4, 23034, {driver}, 8.9")
    (finding,) = [finding for finding in gpu.look(gpu.gpus(), cuda, None) if finding.subject == "NVIDIA driver"]
    assert finding.state == state
    if state == FAILURE:
        assert "580.65.06 or newer" in finding.remedy
        assert "CUDA_VISIBLE_DEVICES=-1" in finding.remedy


@pytest.mark.parametrize(
    ("name", "capability", "state"),
    [
        ("Tesla T4", "7.5", OK),
        ("NVIDIA A100", "8.0", OK),
        ("NVIDIA Jetson Orin", "8.7", OK),
        ("NVIDIA L40S", "8.9", OK),
        ("NVIDIA H100", "9.0", OK),
        ("NVIDIA B300", "10.3", OK),
        ("NVIDIA GB10", "12.1", OK),
        ("Tesla V100", "7.0", FAILURE),
        ("Tesla P100", "6.0", FAILURE),
        ("NVIDIA Thor", "11.0", FAILURE),
        ("NVIDIA X", "[N/A]", WARNING),
    ],
)
def test_compute_capability_is_one_that_torch_was_compiled_for(
    smi: Path, name: str, capability: str, state: str
) -> None:
    answers(smi, f"{name}, 16384, 580.82.07, {capability}")
    finding = found()["compute capability"]
    assert finding.state == state
    assert state != FAILURE or name in finding.found


def test_nvidia_smi_that_knows_no_capability_is_asked_again_without(smi: Path) -> None:
    smi.write_text(
        "#!/bin/sh\n"
        "case $1 in *compute_cap*) echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2;; esac\n"
        f"echo '{UUID.format(0)}, Tesla K80, 11441, 470.57.02, [N/A]'\n"
    )
    smi.chmod(0o755)
    assert found()["compute capability"].state == WARNING
    assert found()["NVIDIA driver"].state == FAILURE


def test_every_failure_is_in_one_message_before_anything_is_fetched(smi: Path) -> None:
    answers(smi, "Tesla P100, 16280, 470.57.02, 6.0")
    with pytest.raises(PipelineError, match=r"(?s)cannot be trained on:.*driver: 470\.57\.02.*capability: Tesla P100"):
        require(gpu.look(gpu.gpus(), 13, None), "this machine's GPU cannot be trained on")


def test_card_whose_memory_is_not_told_is_still_a_gpu(smi: Path) -> None:
    answers(smi, "NVIDIA GB10, [N/A], 580.95.05, 12.1")
    assert gpu.memory() == gpu.UNKNOWN_MEMORY
    assert found()["GPU memory"].state == WARNING
    assert "8 GiB" in found()["GPU memory"].found


SPLIT = "NVIDIA A100-SXM4-80GB, 81920, 580.82.07, 8.0"
TWO = ("NVIDIA A, 8192, 580.82.07, 8.6", "NVIDIA B, 24576, 580.82.07, 8.6")


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        ("0", ["NVIDIA A"]),
        ("1", ["NVIDIA B"]),
        ("1,0", ["NVIDIA B", "NVIDIA A"]),
        (UUID.format(1)[:12], ["NVIDIA B"]),
        ("GPU-", []),  # the beginning of both
        ("0,7,1", ["NVIDIA A"]),  # what follows a wrong one is ignored
        ("0,0", ["NVIDIA A"]),
        ("", []),
        ("-1", []),
        ("none", []),
    ],
)
def test_cuda_visible_devices(smi: Path, monkeypatch: pytest.MonkeyPatch, mask: str, names: list[str]) -> None:
    answers(smi, *TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert [card.name for card in gpu.gpus().cards] == names
    assert gpu.memory() == ({"NVIDIA A": 8, "NVIDIA B": 24}[names[0]] * GIB if names else None)
    if not names:
        assert found()["GPU"] == Finding("GPU", OK, "2 hidden by CUDA_VISIBLE_DEVICES: training runs on the processor")
        assert libraries.wanted_torch("auto") == "auto"


def test_cards_that_differ_may_be_counted_otherwise(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(smi, *TWO)
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in found()["GPU order"].remedy
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert "GPU order" not in found()


@pytest.mark.parametrize(("mask", "told"), [("1", True), ("0,1", True), (UUID.format(1), False)])
def test_order_matters_where_cards_are_named_by_number(
    smi: Path, monkeypatch: pytest.MonkeyPatch, mask: str, told: bool
) -> None:
    answers(smi, *TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert ("GPU order" in found()) == told


@pytest.mark.parametrize("mask", [None, "0", "MIG-7c1e0a4e-1111-5222-8333-444455556666", f"MIG-{UUID.format(0)}/1/0"])
def test_part_of_a_split_card_is_a_gpu_whose_memory_is_not_told(
    smi: Path, monkeypatch: pytest.MonkeyPatch, mask: str | None
) -> None:
    smi.write_text(f"#!/bin/sh\necho '{UUID.format(0)}, {with_mode(SPLIT, 'Enabled')}'\n")
    smi.chmod(0o755)
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert gpu.memory() == gpu.UNKNOWN_MEMORY
    assert found()["GPU"].found == "NVIDIA A100-SXM4-80GB, memory not told"
    assert found()["compute capability"].state == OK
    assert libraries.wanted_torch("auto") == "cuda"


def test_builds_for_other_processors_are_not_judged_by_this_list(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    answers(smi, "NVIDIA Thor, 125772, 580.82.07, 11.0")
    assert found()["compute capability"].state == WARNING
    answers(smi, "NVIDIA Tegra X2, 8000, 580.82.07, 6.2")
    assert found()["compute capability"].state == FAILURE


def test_driver_that_does_not_answer_is_told_in_its_words(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."
    answers(smi, words, status=9)
    assert gpu.memory() is None
    finding = found()["GPU"]
    assert (finding.state, words in finding.found) == (FAILURE, True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5f3e0a1b-0000-1111-2222-333344445555")
    assert found()["GPU"].state == FAILURE
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert found()["GPU"].state == OK


def test_cpu_build_of_torch_beside_a_gpu_is_replaced(smi: Path) -> None:
    answers(smi, GOOD)
    assert found("2.14.1+cpu")["torch"].state == FAILURE
    assert "torch" not in found("2.14.1")
    assert libraries.wanted_torch("auto") == "cuda"
    assert libraries.wanted_torch("cpu") == "cpu"


def test_missing_python_headers_are_named(smi: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers(smi, GOOD)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    assert re.match(r".*Python\.h is missing", found()["Python headers"].found)
    assert re.search(r"apt-get install python3\.\d+-dev", found()["Python headers"].remedy)


def test_without_nvidia_smi_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.memory() is None or Path("/usr/lib/wsl/lib/nvidia-smi").exists()


def test_lock_names_the_cuda_release_that_the_rules_know() -> None:
    assert libraries.locked_cuda() in gpu.FIRST_DRIVER

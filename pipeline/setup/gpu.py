"""The NVIDIA GPU: which cards this machine has, which of them a program may use, and what training on one needs.

Every rule about which card can be used stands here; how much memory training needs, in `model/training_memory.py`.
nvidia-smi is asked, because it is there before anything is installed and answers in a moment; torch takes seconds to
import, and takes gigabytes to have.
"""

import csv
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.figures import GIB, memory_size
from pipeline.processes import find_program
from pipeline.setup.machine_findings import FAILURE, OK, WARNING, Finding

# The first driver for Linux that runs programs of a CUDA release (NVIDIA's CUDA release notes, table "Toolkit driver
# versions"); within one release an older driver runs programs of a newer minor version.
FIRST_DRIVER = {12: (525, 60, 13), 13: (580, 65, 6)}
# The compute capabilities that torch's wheels for x86-64 are compiled for (torch.cuda.get_arch_list of 2.14.1+cu130);
# those for other processors have a list of their own. Compiled code runs on later cards of the same major version.
COMPILED_FOR = ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0))
# bitsandbytes computes 4-bit weights from here on, and so does Triton, in which Unsloth's kernels are written.
LEAST_CAPABILITY = (7, 5)
# Counted for a card whose memory nvidia-smi does not tell, as where it is the machine's own: the smallest in use.
UNKNOWN_MEMORY = 8 * GIB

_FIELDS = ("uuid", "name", "memory.total", "driver_version", "mig.mode.current", "compute_cap")
_HIDE = "to train on the processor instead, set CUDA_VISIBLE_DEVICES=-1"


@dataclass(frozen=True)
class Card:
    """One GPU as nvidia-smi tells of it.

    Attributes:
        uuid: "GPU-...", which CUDA_VISIBLE_DEVICES may name.
        name: e.g. "NVIDIA GeForce RTX 4090".
        memory: in bytes; None where nvidia-smi does not tell, as for the parts of a card that is split (MIG).
        driver: its driver's version, e.g. "580.65.06".
        capability: compute capability, e.g. (8, 9); None where nvidia-smi is too old to know of it.
    """

    uuid: str
    name: str
    memory: int | None
    driver: str
    capability: tuple[int, int] | None


@dataclass(frozen=True)
class Gpus:
    """What was found.

    Attributes:
        cards: those that programs may use, in their order.
        hidden: those that CUDA_VISIBLE_DEVICES hides.
        problem: why nvidia-smi told of no card, in its own words; "" where it did, or there is none.
    """

    cards: tuple[Card, ...] = ()
    hidden: tuple[Card, ...] = ()
    problem: str = ""


def gpus() -> Gpus:
    """Look at the machine."""
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    driver = Path("/proc/driver/nvidia/version").exists()
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if program is None:
        if driver and not _hides_all(mask):
            return Gpus(problem="there is an NVIDIA driver and no nvidia-smi")
        return Gpus()
    try:
        cards = _ask(program)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        words = str(error).strip() or type(error).__name__
        return Gpus(problem="" if _hides_all(mask) else f"nvidia-smi: {words}")
    seen = visible(cards, mask)
    used = {card.uuid for card in seen}
    return Gpus(seen, tuple(card for card in cards if card.uuid not in used))


def _ask(program: str) -> tuple[Card, ...]:
    """The cards that nvidia-smi lists.

    Raises:
        ValueError: with its words, where it lists none.
    """
    answer = None
    for fields in (_FIELDS, _FIELDS[:-1]):  # one before 2021 knows no compute_cap, and then tells nothing at all
        query = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        answer = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=30, check=False)
        if answer.returncode == 0:
            return parse(answer.stdout)
        if "not a valid field" not in answer.stdout + answer.stderr:
            break
    assert answer is not None
    said = (answer.stdout + answer.stderr).strip().splitlines()
    raise ValueError(said[0] if said else f"ended with status {answer.returncode}")


def parse(text: str) -> tuple[Card, ...]:
    """The cards of nvidia-smi's answer: a line each, the fields in the order in which they were asked for."""
    cards = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) < len(_FIELDS) - 1:
            continue
        uuid, name, memory, driver, split, *rest = (field.strip() for field in row)
        numbers = re.fullmatch(r"(\d+)\.(\d+)", rest[0]) if rest else None
        cards.append(
            Card(
                uuid,
                name,
                int(memory) * 2**20 if memory.isdigit() and split != "Enabled" else None,
                driver,
                (int(numbers[1]), int(numbers[2])) if numbers else None,
            )
        )
    return tuple(cards)


def visible(cards: Sequence[Card], mask: str | None) -> tuple[Card, ...]:
    """The cards that CUDA shows a program.

    Args:
        cards: all of them, in nvidia-smi's order.
        mask: CUDA_VISIBLE_DEVICES: numbers, or beginnings of UUIDs; what follows one that is none is ignored. A part
            of a split card ("MIG-...") is the only one that a program sees. None: not set, which hides nothing.
    """
    if mask is None:
        return tuple(cards)
    if mask.strip().startswith("MIG-"):
        return _part(cards, mask.partition(",")[0].strip())
    seen: list[Card] = []
    for word in (word.strip() for word in mask.split(",")):
        named = [cards[int(word)]] if word.isdigit() and int(word) < len(cards) else []
        named = named or [card for card in cards if word and card.uuid.startswith(word)]
        if len(named) != 1 or named[0] in seen:
            break
        seen += named
    return tuple(seen)


def _part(cards: Sequence[Card], name: str) -> tuple[Card, ...]:
    """The card of which a program sees a part: older drivers name it ("MIG-GPU-<its UUID>/1/0"), newer ones do not."""
    card = next((card for card in cards if card.uuid in name), cards[0] if cards else None)
    return () if card is None else (replace(card, memory=None),)


def _hides_all(mask: str | None) -> bool:
    """Whether a mask leaves no card, whatever cards there are: one that names a card by its UUID may leave that."""
    if mask is None or re.match(r"\s*(GPU|MIG)-", mask):
        return False
    return not visible([Card(f"GPU-{n}", "", None, "", None) for n in range(64)], mask)


def memory() -> int | None:
    """Bytes of the first card that a program may use; None without one."""
    cards = gpus().cards
    return None if not cards else cards[0].memory or UNKNOWN_MEMORY


def free_memory() -> int:
    """Bytes that are free on the current CUDA device; 0 without one. Imports torch."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


def look(found: Gpus, cuda: int | None, torch_build: str | None) -> Iterator[Finding]:
    """Judge what training on a GPU needs. A machine without one gets one line that says so.

    Args:
        found: of `gpus`.
        cuda: the CUDA release of the locked torch, e.g. 13; None where the lock names none.
        torch_build: the version of the torch that is installed; None where none is.
    """
    if not found.cards:
        if found.problem:
            yield Finding("GPU", FAILURE, found.problem, f"mend the driver; {_HIDE}")
        elif found.hidden:
            yield Finding(
                "GPU", OK, f"{len(found.hidden)} hidden by CUDA_VISIBLE_DEVICES: training runs on the processor"
            )
        else:
            yield Finding("GPU", OK, "none: training runs on the processor")
        return
    card = found.cards[0]
    words = f"{card.name}, {'memory not told' if card.memory is None else memory_size(card.memory)}"
    more = len(found.cards) - 1
    yield Finding("GPU", OK, f"{words}{f', and {more} more that are not used' if more else ''}")
    if card.memory is None:
        yield Finding(
            "GPU memory",
            WARNING,
            f"nvidia-smi does not tell it; the defaults count on {memory_size(UNKNOWN_MEMORY)}",
            "give train.batch and train.gradient_checkpointing if there is more",
        )
    by_number = os.environ.get("CUDA_VISIBLE_DEVICES", "0")[:1].isdigit()
    kinds = {other.name for other in (*found.cards, *found.hidden)}
    if by_number and len(kinds) > 1 and "CUDA_DEVICE_ORDER" not in os.environ:
        yield Finding(
            "GPU order",
            WARNING,
            "the cards differ, and CUDA may count them in another order than nvidia-smi",
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID, and choose one with CUDA_VISIBLE_DEVICES",
        )
    yield _driver(card, cuda)
    yield _capability(card)
    yield _python_headers()
    yield _triton_compiler()
    if torch_build is not None and torch_build.endswith("+cpu"):
        yield Finding(
            "torch",
            FAILURE,
            f"{torch_build} is a build for the processor",
            "`pipeline setup` installs the ordinary one",
        )


def _driver(card: Card, cuda: int | None) -> Finding:
    needed = FIRST_DRIVER.get(cuda or 0)
    numbers = tuple(int(part) for part in re.findall(r"\d+", card.driver))
    if needed is None or not numbers:
        return Finding("NVIDIA driver", WARNING, f"{card.driver or 'version not told'}: not judged")
    least = f"{needed[0]}.{needed[1]}.{needed[2]:02}"
    if numbers < needed:
        return Finding(
            "NVIDIA driver",
            FAILURE,
            f"{card.driver} is too old for CUDA {cuda}, which the locked torch is built with",
            f"install {least} or newer; {_HIDE}",
        )
    return Finding("NVIDIA driver", OK, card.driver)


def _capability(card: Card) -> Finding:
    if card.capability is None:
        return Finding("compute capability", WARNING, "nvidia-smi is too old to tell it: not judged")
    major, minor = card.capability
    words = f"{major}.{minor}"
    served = any(major == built[0] and minor >= built[1] for built in COMPILED_FOR)
    if card.capability >= LEAST_CAPABILITY and not served and platform.machine() != "x86_64":
        return Finding("compute capability", WARNING, f"{words}: not judged, torch's builds for this processor differ")
    if card.capability < LEAST_CAPABILITY or not served:
        known = ", ".join(f"{a}.{b}" for a, b in COMPILED_FOR)
        return Finding(
            "compute capability",
            FAILURE,
            f"{card.name} has {words}; the locked torch and Unsloth serve {known} and later ones of the same kind",
            f"choose another card with CUDA_VISIBLE_DEVICES; {_HIDE}",
        )
    return Finding("compute capability", OK, words)


def _python_headers() -> Finding:
    """Triton compiles a C file that includes Python.h before the first step."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if header.is_file():
        return Finding("Python headers", OK, str(header))
    version = sysconfig.get_python_version()
    return Finding(
        "Python headers",
        FAILURE,
        f"{header} is missing, and Triton compiles Unsloth's kernels with it",
        f"install them, e.g. `apt-get install python{version}-dev`",
    )


def _triton_compiler() -> Finding:
    found = os.environ.get("CC") or find_program("cc", "gcc", "clang")
    if found:
        return Finding("C compiler for Triton", OK, found)
    return Finding(
        "C compiler for Triton", FAILURE, "none on PATH", "install one, e.g. `apt-get install gcc`, or name it with CC"
    )

"""The Python libraries: exactly those of requirements.lock, in the environment that runs `pipeline setup`.

What is installed is read from the environment itself, so there is no stamp that could be wrong. The lock
serves machines with and without a GPU; only torch differs, where an index or folder that the machine is
configured for offers its CPU build.
"""

import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import say
from pipeline.errors import PipelineError
from pipeline.processes import disk_errors, run
from pipeline.setup.indexes import uv_environment
from pipeline.setup.machine import system_name

CPU, CUDA, AUTO = "cpu", "cuda", "auto"
# What only a CUDA build of torch loads.
_CUDA_ONLY = re.compile(r"(nvidia|cuda)-")


@dataclass(frozen=True)
class Requirement:
    """One pinned package of a lock: `text` is its lines there, hashes and all."""

    name: str
    version: str
    marker: str
    text: str


def read_lock(text: str) -> list[Requirement]:
    """The packages of a lock that uv wrote."""
    found = []
    for block in re.split(r"^(?=[A-Za-z0-9])", text, flags=re.M):
        if match := re.match(r"([\w.-]+)==([^\s;\\]+)(?: ; ([^\\\n]+))?", block):
            name, version, marker = match.groups()
            found.append(Requirement(name, version, (marker or "").strip(), block))
    return found


def applicable(lock: list[Requirement]) -> list[Requirement]:
    """Those that this Python on this system needs.

    Raises:
        PipelineError: the lock is for other systems.
    """
    from packaging.markers import Marker

    found = [pin for pin in lock if not pin.marker or Marker(pin.marker).evaluate()]
    if not found:
        raise PipelineError(
            f"requirements.lock has nothing for {system_name()}: it serves Linux with Python 3.11 to 3.14"
        )
    return found


@dataclass(frozen=True)
class Environment:
    """A virtual environment, by its folder."""

    prefix: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.prefix / "bin" / "python"

    def installed(self) -> Iterator[tuple[str, str, bool]]:
        """Name, version, and whether the installation was finished, of every package in it."""
        bases = {"base": str(self.prefix), "platbase": str(self.prefix)}
        for folder in {sysconfig.get_path(kind, "venv", vars=bases) for kind in ("purelib", "platlib")}:
            for info in Path(folder).glob("*.dist-info"):
                name, _, version = info.name.removesuffix(".dist-info").partition("-")
                # An installer names itself in this file when everything else is in place.
                yield _normal(name), version, (info / "INSTALLER").exists()


def missing(lock: list[Requirement], environment: Environment, torch: str) -> list[str]:
    """Names of the packages of a lock that are not in the environment as they should be.

    Args:
        lock: the lock.
        environment: where to look.
        torch: "cpu" or "cuda" wants that build of torch, "auto" takes either.
    """
    there = {(name, version) for name, version, finished in environment.installed() if finished}
    pins = applicable(lock)
    cpu_build = next(((pin.name, f"{pin.version}+cpu") for pin in pins if pin.name == "torch"), None)
    has_cpu_build = cpu_build in there
    absent = []
    for pin in pins:
        if pin.name == "torch" and (has_cpu_build or torch == CPU):
            if torch == (CUDA if has_cpu_build else CPU):
                absent.append(pin.name)
        elif (_normal(pin.name), pin.version) not in there and not (has_cpu_build and _CUDA_ONLY.match(pin.name)):
            absent.append(pin.name)
    return absent


def install(lock_file: Path, environment: Environment, torch: str, *, nvidia_driver: bool) -> None:
    """Fill the environment from the lock, or from the lock with torch's CPU build in it.

    Args:
        lock_file: the lock.
        environment: what is filled; packages that are no part of the lock are left alone.
        torch: "cpu", "cuda" or "auto" (the CPU build where there is no driver and the machine offers one).
        nvidia_driver: whether the machine has one.

    Raises:
        PipelineError: a wrong hash, no network, no disk, or no CPU build where one was asked for.
    """
    lock = read_lock(lock_file.read_text(encoding="utf-8"))
    variables = uv_environment()
    chosen = None
    if torch == CPU or (torch == AUTO and not nvidia_driver):
        chosen = _cpu_build_if_offered(lock, environment, variables, required=torch == CPU)
    rest = with_cpu_build(lock, chosen) if chosen is not None else with_ordinary_build(lock)
    _install(rest, environment, variables)
    if chosen is not None and "--hash=" not in chosen.text:
        # An index tells hashes, a folder of wheels does not: what lies there is its owner's choice.
        _uv_install([f"{chosen.name}=={chosen.version}"], environment, variables)


def _install(text: str, environment: Environment, variables: dict[str, str]) -> None:
    """Install the packages of a lock, each only if a file with one of its hashes is to be had."""
    halves = [name for name, _, finished in environment.installed() if not finished]
    lock_file = environment.prefix / "requirements.installed.lock"
    with disk_errors(environment.prefix):
        lock_file.write_text(text, encoding="utf-8")
    again = [word for name in halves for word in ("--reinstall-package", name)]
    _uv_install(["--require-hashes", "-r", str(lock_file), *again], environment, variables)


def _uv_install(what: list[str], environment: Environment, variables: dict[str, str]) -> None:
    run(
        # Hashes and local versions say which file is right, whichever index has it.
        [_uv(), "pip", "install", "--python", environment.python, "--no-deps", *_ANY_INDEX, *what],
        "installing the Python libraries",
        env=variables,
        on_line=_Downloads(),
        explain=((re.compile(r"hash mismatch|hash(es)? did not match", re.I), _WRONG_HASH),),
    )


_ANY_INDEX = ("--index-strategy", "unsafe-best-match")
_WRONG_HASH = "a package is not the one that requirements.lock names (wrong hash); it was not installed"


def _cpu_build_if_offered(
    lock: list[Requirement], environment: Environment, variables: dict[str, str], *, required: bool
) -> Requirement | None:
    pin = next((pin for pin in applicable(lock) if pin.name == "torch"), None)
    if pin is None:
        return None
    offered = cpu_build(pin, environment, variables)
    if offered is not None:
        say(f"torch: the CPU build {offered.version} is offered here and taken")
    elif required:
        raise PipelineError(
            f"torch {pin.version}+cpu is not offered by the indexes that pip and uv are configured for here; "
            "add one that has it, or leave out `--torch cpu`: the ordinary build runs on a CPU too"
        )
    else:
        say("torch: no CPU build is offered here; taking the ordinary build, which runs on a CPU too")
    return offered


def cpu_build(pin: Requirement, environment: Environment, variables: dict[str, str]) -> Requirement | None:
    """The CPU build of torch, with its hashes, if the machine's indexes and folders offer it; else None."""
    wanted = f"{pin.name}=={pin.version}+cpu"
    try:
        answer = run(
            [
                *(
                    _uv(),
                    "pip",
                    "compile",
                    "--quiet",
                    "--no-deps",
                    "--generate-hashes",
                    "--no-header",
                    "--no-annotate",
                ),
                *(
                    "--no-emit-index-url",
                    "--no-emit-find-links",
                    *_ANY_INDEX,
                    "--python",
                    environment.python,
                    "-",
                ),
            ],
            "looking for the CPU build of torch",
            env={**variables, "UV_HTTP_RETRIES": os.environ.get("UV_HTTP_RETRIES", "0")},
            text=wanted,
        )
    except PipelineError:
        return None
    return next((found for found in read_lock(answer) if f"{found.name}=={found.version}" == wanted), None)


def with_cpu_build(lock: list[Requirement], torch: Requirement) -> str:
    """The lock's text with torch's CPU build in place of the ordinary one and of what only that loads."""
    kept = [pin.text for pin in lock if pin.name != "torch" and not _CUDA_ONLY.match(pin.name)]
    return "".join([*kept, f"{torch.text.rstrip()}\n"] if "--hash=" in torch.text else kept)


def with_ordinary_build(lock: list[Requirement]) -> str:
    """The lock's text with torch pinned so that no local version, such as 2.0+cpu for 2.0, satisfies it."""
    return "".join(pin.text.replace("==", "===", 1) if pin.name == "torch" else pin.text for pin in lock)


def _uv() -> str:
    """The uv that this program depends on."""
    from uv import find_uv_bin

    return find_uv_bin()


class _Downloads:
    """What uv tells of its progress, in fewer lines: the big files, and how much of everything is here."""

    def __init__(self) -> None:
        self.sizes: dict[str, float] = {}
        self.done = 0.0

    def __call__(self, line: str) -> None:
        line = line.strip()
        if match := re.fullmatch(r"Downloading (\S+) \(([\d.]+)([KMG])iB\)", line):
            self.sizes[match[1]] = float(match[2]) * {"K": 2**-10, "M": 1, "G": 2**10}[match[3]]
        elif match := re.fullmatch(r"Downloaded (\S+)", line):
            size = self.sizes.get(match[1], 0.0)
            self.done += size
            if size >= 50:
                say(f"  fetched {match[1]}: {self.done:,.0f} of {sum(self.sizes.values()):,.0f} MiB")
        elif re.match(r"(Resolved|Prepared|Installed) ", line):
            say(f"  {line}")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def this_environment() -> Environment:
    """The environment that runs this program."""
    return Environment(Path(sys.prefix))

"""The Python libraries: exactly those of requirements.lock, in the environment that runs this.

    python -m pipeline.setup.libraries

An empty virtual environment is enough: pip installs what third_party/bootstrap.lock names (uv, and what reads the
lock's markers), uv installs the whole lock, and in a checkout this program itself goes in last, without dependencies.
So this module imports the standard library alone until that is done. Hashes are checked all the way.

What is installed is read from the environment itself, so there is no stamp that could be wrong. The lock serves
machines with and without a GPU. torch's CPU build, which it does not name, comes in by the user's word alone
(`--torch cpu`), from an index or folder that the machine is configured for; where it is, it stays.
"""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pipeline.console import say, use_plain_text
from pipeline.errors import PipelineError
from pipeline.figures import GIB
from pipeline.processes import disk_errors, exclusive, run
from pipeline.resources import checkout, checkout_at, resource
from pipeline.setup import gpu, machine
from pipeline.setup.indexes import pip_environment, uv_environment, uv_options
from pipeline.setup.machine_findings import FAILURE, OK, WARNING, Finding, require

CPU, CUDA, AUTO = "cpu", "cuda", "auto"
# What only a CUDA build of torch loads.
_CUDA_ONLY = re.compile(r"(nvidia|cuda)-")
_THIS_PROGRAM = "finetune-pipeline"


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


def locked() -> list[Requirement]:
    """The packages of requirements.lock, for every Python and system that it serves."""
    return read_lock(resource("requirements.lock").read_text(encoding="utf-8"))


def locked_cuda() -> int | None:
    """The CUDA release that the locked torch is built with, e.g. 13."""
    runtime = next((pin.version for pin in locked() if pin.name == "nvidia-cuda-runtime"), None)
    return int(runtime.partition(".")[0]) if runtime else None


def applicable(lock: list[Requirement]) -> list[Requirement]:
    """Those that this Python on this system needs.

    Raises:
        PipelineError: the lock is for other systems.
    """
    from packaging.markers import Marker

    found = [pin for pin in lock if not pin.marker or Marker(pin.marker).evaluate()]
    if not found:
        raise PipelineError(
            f"requirements.lock has nothing for {machine.system_name()}: it serves Linux with Python 3.11 to 3.14"
        )
    return found


@dataclass(frozen=True)
class Installed:
    """A package in an environment.

    Attributes:
        name: normalized.
        version: as installed.
        folder: its dist-info.
        finished: whether its installation came to its end and its files are there.
    """

    name: str
    version: str
    folder: Path
    finished: bool

    @property
    def as_published(self) -> bool:
        """Whether it is whole and an index or a folder of wheels gave it, not a URL or a source tree (PEP 610)."""
        return self.finished and not (self.folder / "direct_url.json").exists()

    @property
    def described(self) -> str:
        """The version, which is a lock's own only if the package is as published."""
        return self.version if self.as_published else f"{self.version} of somebody's own"


@dataclass(frozen=True)
class Environment:
    """A virtual environment, by its folder."""

    prefix: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.prefix / "bin" / "python"

    def installed(self) -> Iterator[Installed]:
        """Every package in it."""
        bases = {"base": str(self.prefix), "platbase": str(self.prefix)}
        folders = {sysconfig.get_path(kind, "venv", vars=bases) for kind in ("purelib", "platlib")}
        found = [(info, *_name_and_version(info)) for folder in folders for info in Path(folder).glob("*.dist-info")]
        names = Counter(name for _, name, _ in found)
        for info, name, version in found:
            # Installers write these two when everything else is in place; one name twice is half of an upgrade.
            finished = names[name] == 1 and (info / "INSTALLER").is_file() and (info / "RECORD").is_file()
            yield Installed(name, version, info, finished and not _lacks_files(info))


def _name_and_version(info: Path) -> tuple[str, str]:
    name, _, version = info.name.removesuffix(".dist-info").partition("-")
    return _normal(name), version


def _lacks_files(info: Path) -> bool:
    """Whether a file that a package's RECORD names is not there."""
    with (info / "RECORD").open(encoding="utf-8", newline="") as record:
        names = (row[0] for row in csv.reader(record) if row and not row[0].endswith(".pyc"))
        return not all(os.path.lexists(os.path.join(info.parent, name)) for name in names)  # noqa: PTH118 (speed)


def this_environment() -> Environment:
    """The environment that runs this program."""
    return Environment(Path(sys.prefix))


def differences(lock: list[Requirement], environment: Environment, torch: str) -> dict[str, str | None]:
    """The packages of a lock that are not in the environment as they should be.

    Args:
        lock: the lock.
        environment: where to look.
        torch: "cpu" or "cuda" wants that build of torch, "auto" takes either.

    Returns:
        For each name the version that is there instead; None where there is none, or one that is broken.
    """
    whole = {package.name: package.described for package in environment.installed() if package.finished}
    pins = applicable(lock)
    cpu_build = next((f"{pin.version}+cpu" for pin in pins if pin.name == "torch"), None)
    has_cpu_build = cpu_build is not None and whole.get("torch") == cpu_build
    found: dict[str, str | None] = {}
    for pin in pins:
        name = _normal(pin.name)
        if name == "torch" and (has_cpu_build or torch == CPU):
            if torch == (CUDA if has_cpu_build else CPU):
                found[pin.name] = whole.get(name)
        elif has_cpu_build and torch != CUDA and _CUDA_ONLY.match(name):
            continue
        elif whole.get(name) != pin.version:
            found[pin.name] = whole.get(name)
    return found


def space_for(wrong: Collection[str]) -> float:
    """Bytes that installing these packages takes: torch and its CUDA libraries are nearly all of a lock."""
    return (7.0 if "torch" in wrong else 0.5 if wrong else 0.0) * GIB


def look() -> Finding:
    """Judge this environment against the lock. Other versions may work as well: they are named, and are no failure."""
    wrong = differences(locked(), this_environment(), AUTO)
    absent = [name for name, version in wrong.items() if version is None]
    remedy = "run `pipeline setup`"
    if absent:
        words = f"{len(absent)} missing or broken: {_some(absent)}"
        return Finding("libraries", FAILURE, words, remedy)
    if wrong:
        pins = {pin.name: pin.version for pin in applicable(locked())}
        words = _some([f"{name} is {version}, tested was {pins[name]}" for name, version in wrong.items()])
        return Finding("libraries", WARNING, words, remedy)
    return Finding("libraries", OK, f"{len(applicable(locked()))} as locked, in {sys.prefix}")


def wanted_torch(choice: str) -> str:
    """The build of torch that a choice means on this machine: with a GPU, "auto" is the one that can use it."""
    return CUDA if choice == AUTO and gpu.gpus().cards else choice


def up_to_date(choice: str = AUTO) -> bool:
    """Whether this environment is as `bring_up_to_date` would leave it."""
    environment = this_environment()
    return not differences(locked(), environment, wanted_torch(choice)) and not _program_is_missing(environment)


def bring_up_to_date(choice: str = AUTO) -> bool:
    """Fill this environment from the lock, whatever versions are there.

    Args:
        choice: which build of torch: "auto", "cpu" or "cuda".

    Returns:
        Whether anything had to be installed.

    Raises:
        PipelineError: what stands in the way: a GPU that could not be trained on, no disk, no network, a wrong hash.
    """
    environment = this_environment()
    machine.require_virtual_environment()
    bootstrapped = _is_bootstrapped(environment)
    if bootstrapped and up_to_date(choice):
        return False
    if choice != CPU:
        require(gpu.look(gpu.gpus(), locked_cuda(), None), "this machine's GPU cannot be trained on")
    if not bootstrapped:
        _bootstrap(environment)
        if up_to_date(choice):
            return True
    torch = wanted_torch(choice)
    wrong = differences(locked(), environment, torch)
    machine.require_space({environment.prefix: space_for(wrong)})
    with exclusive(environment.prefix / ".pipeline-setup.lock"):
        wrong = differences(locked(), environment, torch)
        if wrong:
            say(f"Python libraries: {len(wrong)} of {len(applicable(locked()))} are to be installed")
            install(resource("requirements.lock"), environment, torch)
            compile_libraries(environment)
        if _program_is_missing(environment):
            _install_program(environment)
        left = differences(locked(), environment, torch)
    if left:
        words = ", ".join(f"{name} ({version or 'missing'})" for name, version in left.items())
        raise PipelineError(
            f"{environment.prefix}: these libraries are still not as locked: {words}. Make a new virtual environment "
            "and set up in that"
        )
    return True


def compile_libraries(environment: Environment) -> None:
    """Compile the libraries once: else the first start of each stage does, or every start where it may not write.

    A third of all lines are left out: tests, models of which a run reads one, and a program of Unsloth's own. Whoever
    has told Python to write no compiled code gets none.
    """
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        return
    say("compiling the Python libraries")
    folders = {package.folder.parent for package in environment.installed()}
    # Some packages hold files of other Pythons, which do not compile: that is no fault.
    left_out = ("-x", r"/(tests?|studio|transformers/models)/")
    command: list[str | Path] = [environment.python, "-m", "compileall", "-q", "-j", "0", *left_out, *sorted(folders)]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _bootstrap_lock() -> Path:
    return resource("third_party/bootstrap.lock")


def _is_bootstrapped(environment: Environment) -> bool:
    """Whether what this module itself needs is there as locked."""
    there = {(package.name, package.version) for package in environment.installed() if package.as_published}
    pins = read_lock(_bootstrap_lock().read_text(encoding="utf-8"))
    return all((_normal(pin.name), pin.version) in there for pin in pins)


def _bootstrap(environment: Environment) -> None:
    """Have pip install what this module itself needs."""
    lock_file = _bootstrap_lock()
    _forget_halves(environment, [pin.name for pin in read_lock(lock_file.read_text(encoding="utf-8"))])
    options = ["--disable-pip-version-check", "--no-input", "install", "--quiet", "--no-deps", "--force-reinstall"]
    options.append("--only-binary=:all:")
    run(
        [environment.python, "-m", "pip", *options, "--require-hashes", "-r", lock_file],
        "fetching uv",
        env=pip_environment(),
        explain=((re.compile(r"do not match the hashes", re.I), _WRONG_HASH), (_NOT_OFFERED, _NO_INDEX)),
        logs=environment.prefix / "logs",
    )


def install(lock_file: Path, environment: Environment, torch: str) -> None:
    """Fill the environment from the lock, or from the lock with torch's CPU build in it.

    Args:
        lock_file: the lock.
        environment: what is filled; packages that are no part of the lock are left alone.
        torch: "cpu", "cuda" or "auto" (the ordinary build, as the lock has it).

    Raises:
        PipelineError: a wrong hash, no network, no disk, or no CPU build where one was asked for.
    """
    lock = read_lock(lock_file.read_text(encoding="utf-8"))
    variables = uv_environment()
    wrong = differences(lock, environment, torch)
    if "torch" not in wrong:  # the build that is there stays
        _install("".join(pin.text for pin in lock if pin.name in wrong), environment, variables)
        return
    if torch != CPU:
        _install(with_ordinary_build(lock), environment, variables)
        return
    chosen = cpu_build(lock, environment, variables)
    _install(with_cpu_build(lock, chosen), environment, variables)
    if "--hash=" not in chosen.text:
        # An index tells hashes, a folder of wheels does not: what lies there is its owner's choice.
        _uv_install([f"{chosen.name}=={chosen.version}"], environment, variables)


def _install(text: str, environment: Environment, variables: dict[str, str | None]) -> None:
    """Install the packages of a lock, each only if a file with one of its hashes is to be had."""
    halves = _forget_halves(environment, [pin.name for pin in read_lock(text)])
    lock_file = environment.prefix / "requirements.installed.lock"
    with disk_errors(environment.prefix):
        lock_file.write_text(text, encoding="utf-8")
    again = [word for name in halves for word in ("--reinstall-package", name)]
    _uv_install(["--require-hashes", "-r", str(lock_file), *again], environment, variables)


def _forget_halves(environment: Environment, names: Iterable[str]) -> list[str]:
    """Remove what tells that these packages are there, where they are not as published: their files are written over.

    Returns:
        The names of those.
    """
    wanted = {_normal(name) for name in names}
    halves = [package for package in environment.installed() if not package.as_published and package.name in wanted]
    with disk_errors(environment.prefix):
        for package in halves:
            shutil.rmtree(package.folder)
    return [package.name for package in halves]


def _uv_install(what: list[str], environment: Environment, variables: dict[str, str | None]) -> None:
    run(
        # Hashes and local versions say which file is right, whichever index has it.
        [
            _uv(),
            "pip",
            "install",
            "--python",
            environment.python,
            "--no-deps",
            "--no-build",
            *_ANY_INDEX,
            *uv_options(variables),
            *what,
        ],
        "installing the Python libraries",
        env=variables,
        on_line=_Downloads(),
        explain=(
            (re.compile(r"hash mismatch|hash(es)? did not match", re.I), _WRONG_HASH),
            (_NOT_OFFERED, _NO_INDEX),
        ),
        logs=environment.prefix / "logs",
    )


_ANY_INDEX = ("--index-strategy", "unsafe-best-match")
_WRONG_HASH = "a package is not the one that the lock names (wrong hash); it was not installed"
_NOT_OFFERED = re.compile(
    r"no matching distribution|there is no version of|was not found in the (provided )?package", re.I
)
_NO_INDEX = (
    "the package indexes and folders that pip and uv are configured for cannot be reached, or do not have a locked "
    "package"
)


def _program_is_missing(environment: Environment) -> bool:
    """Whether this is a checkout, and its environment does not run this checkout.

    An environment that lies elsewhere may be another checkout's, which it then stays.
    """
    root = checkout()
    if root is None:
        return False
    for package in environment.installed():
        if package.name == _THIS_PROGRAM and package.finished:
            try:
                url = json.loads((package.folder / "direct_url.json").read_text(encoding="utf-8"))["url"]
                entry = (package.folder / "entry_points.txt").read_text(encoding="utf-8")
            except (OSError, ValueError, KeyError):
                return True
            origin = Path(url2pathname(urlsplit(url).path))
            if origin != root:
                return environment.prefix.is_relative_to(root) or not checkout_at(origin)
            return "pipeline.__main__:main" not in entry or not (environment.prefix / "bin" / "pipeline").is_file()
    return True


def _install_program(environment: Environment) -> None:
    """Install this checkout, so that its files are what runs, with the locked build backend and nothing else."""
    root = checkout()
    assert root is not None
    run(
        [_uv(), "pip", "install", "--python", environment.python, "--no-deps", "--no-build-isolation", "--offline",
         "--reinstall-package", _THIS_PROGRAM, "--editable", root],
        "installing this program",
        env=uv_environment(),
        logs=environment.prefix / "logs",
    )  # fmt: skip


def cpu_build(lock: list[Requirement], environment: Environment, variables: dict[str, str | None]) -> Requirement:
    """The CPU build of a lock's torch, with its hashes where an index tells them.

    Raises:
        PipelineError: the machine's indexes and folders do not offer it.
    """
    wanted = next(f"torch=={pin.version}+cpu" for pin in applicable(lock) if pin.name == "torch")
    quiet = ("--quiet", "--no-deps", "--generate-hashes", "--no-header", "--no-annotate")
    hosts = ("--no-emit-index-url", "--no-emit-find-links", *_ANY_INDEX)
    answer = run(
        [_uv(), "pip", "compile", *quiet, *hosts, *uv_options(variables), "--python", environment.python, "-"],
        "looking for the CPU build of torch",
        env=variables,
        text=wanted,
        explain=(
            (
                re.compile("No solution found"),
                f"{wanted} is not offered by the indexes that pip and uv are configured for here; add one that has it, "
                "or leave out `--torch cpu`: the ordinary build runs on a CPU too",
            ),
        ),
        logs=environment.prefix / "logs",
    )
    return next(found for found in read_lock(answer) if f"{found.name}=={found.version}" == wanted)


def with_cpu_build(lock: list[Requirement], torch: Requirement) -> str:
    """The lock's text with torch's CPU build in place of the ordinary one and of what only that loads."""
    kept = [pin.text for pin in lock if pin.name != "torch" and not _CUDA_ONLY.match(pin.name)]
    return "".join([*kept, f"{torch.text.rstrip()}\n"] if "--hash=" in torch.text else kept)


def with_ordinary_build(lock: list[Requirement]) -> str:
    """The lock's text with torch pinned so that no local version, such as 2.0+cpu for 2.0, satisfies it."""
    return "".join(pin.text.replace("==", "===", 1) if pin.name == "torch" else pin.text for pin in lock)


def _uv() -> str:
    """The uv of this environment."""
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


def _some(words: list[str], most: int = 4) -> str:
    left = len(words) - most
    return ", ".join(words[:most]) + (f" and {left} more" if left > 0 else "")


def _normal(name: str) -> str:
    """As packaging.utils.canonicalize_name, which is not there yet when this is first asked."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    """The command: 0 done, else the error's status."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.setup.libraries", description=__doc__.split("\n")[0])
    parser.add_argument("--torch", choices=(AUTO, CPU, CUDA), default=AUTO, help="which build of torch")
    given = parser.parse_args()
    use_plain_text()  # rich may be replaced under this process
    try:
        bring_up_to_date(given.torch)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted; the same command continues where this one stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

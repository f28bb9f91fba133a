"""Building llama.cpp: fetch, check, unpack what is needed, configure, compile, put the results together.

Every step leaves a whole result or none, and ninja continues a build that was interrupted.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.console import progress, say
from pipeline.errors import PipelineError
from pipeline.processes import disk_errors, find_program, run
from pipeline.setup.fetch import fetch_package, unpack
from pipeline.setup.pins import SourcePin
from pipeline.setup.places import downloads, source_home

_COUNT = re.compile(r"\[ *(\d+)(?:/(\d+)|%)\]")


def build_programs(pin: SourcePin, names: Sequence[str], holding: Sequence[int] = ()) -> None:
    """Build some of the programs of a pin, unless they are there.

    Args:
        pin: where the source comes from and how it is configured.
        names: the programs.
        holding: descriptors of locks that the compilers hold too.

    Raises:
        PipelineError: fetching, unpacking, configuring or compiling failed, or a program does not start.
    """
    home = source_home(pin)
    if all((home / "bin" / name).is_file() for name in names):
        return
    source = unpacked(pin)
    build = home / "build"
    # cmake writes the generator's file last: a configuration that was interrupted is done again.
    if not any((build / name).exists() for name in ("build.ninja", "Makefile")):
        shutil.rmtree(build, ignore_errors=True)
        generator = ["-G", "Ninja"] if find_program("ninja") else ["-G", "Unix Makefiles"]
        run(
            [_cmake(), *generator, "-S", source, "-B", build, *pin.cmake],
            f"configuring {pin.package}",
            # Whatever repository the cache lies in, it is not this source's.
            env={"GIT_CEILING_DIRECTORIES": str(home.parent)},
            holding=holding,
        )
    what = f"building {', '.join(names)}"
    say(what)
    with counted(what) as on_line:
        jobs = str(os.cpu_count() or 1)
        run(
            [_cmake(), "--build", build, "--parallel", jobs, "--target", *names],
            what,
            on_line=on_line,
            holding=holding,
        )
    install_programs(build / "bin", home / "bin", names)


def unpacked(pin: SourcePin) -> Path:
    """The folder with the pinned source; fetched and unpacked if it is not there."""
    home = source_home(pin)
    source = home / "source"
    if source.is_dir():
        return source
    archive = downloads() / f"{pin.package.replace('-', '_')}-{pin.version}.tar.gz"
    fetch_package(pin, archive, source=True)
    partial = home / "source.partial"
    shutil.rmtree(partial, ignore_errors=True)
    unpack(archive, partial, wanted_path(pin))
    if not (partial / "CMakeLists.txt").is_file():
        raise PipelineError(f"{archive}: there is no CMakeLists.txt in its folder {pin.folder}")
    with disk_errors(home):
        partial.rename(source)
    return source


def wanted_path(pin: SourcePin) -> Callable[[str], str | None]:
    """Which files of the distribution are unpacked, and where to."""

    def inside(path: str, folders: Sequence[str]) -> bool:
        return any(path == folder or path.startswith(f"{folder}/") for folder in folders)

    def rename(member: str) -> str | None:
        _, _, path = member.partition("/")
        path, prefix = path.removeprefix(f"{pin.folder}/"), path.startswith(f"{pin.folder}/")
        return path if prefix and inside(path, pin.keep) and not inside(path, pin.leave) else None

    return rename


def install_programs(built: Path, folder: Path, names: Sequence[str]) -> None:
    """Copy programs, and every library that was built, into one folder.

    Libraries go first, so that a program that is there can run.
    """
    libraries = [path for path in sorted(built.iterdir()) if ".so" in path.name]
    with disk_errors(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*libraries, *(built / name for name in names)]:
            partial = folder / f".{path.name}.partial"
            partial.unlink(missing_ok=True)
            shutil.copy2(path, partial, follow_symlinks=False)
            partial.replace(folder / path.name)
    for name in names:
        answer = subprocess.run([folder / name, "--version"], capture_output=True, text=True, check=False)
        # llama-quantize knows no --version and answers with its usage and status 1.
        if answer.returncode not in (0, 1):
            (folder / name).unlink()
            raise PipelineError(f"{name} was built and does not start: {answer.stderr.strip() or answer.returncode}")


@contextmanager
def counted(what: str) -> Iterator[Callable[[str], None]]:
    """Progress of a build from the lines it prints: ninja's [3/40] or make's [ 7%]."""
    with ExitStack() as stack:
        done: Callable[[float], None] | None = None

        def on_line(text: str) -> None:
            nonlocal done
            if match := _COUNT.match(text):
                steps = match[2] is not None
                if done is None:
                    total = float(match[2]) if steps else 100.0
                    done = stack.enter_context(progress(what, total, "steps" if steps else "%"))
                done(float(match[1]))

        yield on_line


def _cmake() -> str:
    program = find_program("cmake")
    if program is None:
        raise PipelineError("cmake is not on PATH; install it and run `pipeline setup` again")
    return program

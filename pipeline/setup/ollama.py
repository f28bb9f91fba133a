"""Building Ollama from its Go module, and giving it the llama.cpp programs that it runs."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.console import progress
from pipeline.errors import PipelineError
from pipeline.processes import disk_errors, find_program, run
from pipeline.setup.pins import ModulePin
from pipeline.setup.places import ollama_home

_PROGRAMS = ("llama-server", "llama-quantize")
_TOO_OLD = re.compile(r"requires go *>?=? *[\d.]+|toolchain not available", re.I)


def build_ollama(pin: ModulePin, llamacpp: Path, holding: Sequence[int] = ()) -> None:
    """Build Ollama, unless it is there.

    It is built inside the module itself, so that the module's own go.sum checks everything it is built from.

    Args:
        pin: the module; its hash is checked before anything of it is compiled.
        llamacpp: the folder of the built llama.cpp programs.
        holding: descriptors of locks that the compiler holds too.

    Raises:
        PipelineError: no Go, too old a Go, no network, a wrong hash, no disk.
    """
    home = ollama_home(pin)
    program = home / "bin" / "ollama"
    if program.is_file():
        return
    go = find_program("go")
    if go is None:
        raise PipelineError("Go is not on PATH; install it and run `pipeline setup` again")
    too_old = ((_TOO_OLD, f"this Go is too old for Ollama {pin.version}; install a newer one"),)
    name = f"{pin.module}@v{pin.version}"
    answer = run([go, "mod", "download", "-json", name], f"fetching Ollama {pin.version}", explain=too_old)
    module = json.loads(answer[answer.index("{") :])
    if module["Sum"] != pin.sum:
        raise PipelineError(
            f"{name}: wrong hash: {module['Sum']}, pinned is {pin.sum}. It is not used; `go clean -modcache` removes it"
        )
    flags = ["-trimpath", "-ldflags", f"-s -w -X {pin.module}/version.Version={pin.version}"]
    what = f"building Ollama {pin.version}"
    stale = [
        go,
        "list",
        "-C",
        module["Dir"],
        "-deps",
        *flags,
        "-f",
        "{{if .Stale}}{{.ImportPath}}{{end}}",
        ".",
    ]
    total = sum(bool(line.strip()) for line in run(stale, f"fetching what Ollama {pin.version} uses").splitlines())
    partial = home / "bin" / ".ollama.partial"
    with progress(what, total, "packages") as done:
        built = 0

        def on_line(line: str) -> None:
            nonlocal built
            if not line.startswith(("#", "go: downloading", " ", "\t")):
                built = min(built + 1, total)
                done(built)

        compiled = [go, "build", "-C", module["Dir"], "-v", *flags, "-o", partial, "."]
        run(compiled, what, on_line=on_line, explain=too_old, holding=holding)
        done(total)
    link_programs(llamacpp, home / "lib" / "ollama")
    with disk_errors(home):
        partial.replace(program)


def link_programs(llamacpp: Path, folder: Path) -> None:
    """Put the llama.cpp programs that Ollama runs, and their libraries, where it looks: ../lib/ollama."""
    with disk_errors(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
        libraries = [path for path in sorted(llamacpp.iterdir()) if ".so" in path.name and path.name[0] != "."]
        for path in [*libraries, *(llamacpp / name for name in _PROGRAMS)]:
            target = folder / path.name
            target.unlink(missing_ok=True)
            if path.is_symlink():
                target.symlink_to(path.readlink())
            else:
                try:
                    os.link(path, target)
                except OSError:  # a disk without hard links
                    shutil.copy2(path, target)

"""`pipeline setup`: the parts of set-up in the order in which the main job needs them."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.setup.pins import Pins


@click.command()
@click.option(
    "--torch",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Which build of torch: auto takes the CPU build where there is no NVIDIA driver and one is offered.",
)
@click.option(
    "--dev", is_flag=True, help="Also what only the tests need: real tokenizers, and Ollama as pinned."
)
def setup(torch: str, dev: bool) -> None:
    """Install the locked Python libraries, and build llama.cpp and Ollama.

    Libraries go into the virtual environment that runs this command; programs into a cache that all checkouts
    share (PIPELINE_CACHE names another folder). What is there already is left alone. After the first time no
    network is needed.
    """
    started = time.monotonic()
    changed = set_up_libraries(torch)
    if changed:
        # Modules that this process has loaded may just have been replaced: go on in a new one.
        os.execv(sys.executable, [sys.executable, "-m", "pipeline", *sys.argv[1:]])  # noqa: S606
    warnings = set_up_programs(dev)
    from pipeline.console import say, warn

    for text in warnings:
        warn(text)
    say(f"set up ({time.monotonic() - started:.1f} s)")


def set_up_libraries(torch: str) -> bool:
    """Fill the environment from requirements.lock.

    Returns:
        Whether anything had to be installed.
    """
    from pipeline.console import say
    from pipeline.resources import cache_folder, resource
    from pipeline.setup import libraries, machine
    from pipeline.setup.processes import exclusive

    machine.require_virtual_environment()
    environment, lock_file = libraries.this_environment(), resource("requirements.lock")
    lock = libraries.read_lock(lock_file.read_text(encoding="utf-8"))
    missing = libraries.missing(lock, environment, torch)
    if not missing:
        return False
    # Everything that can stop set-up later is asked before the long download.
    machine.require_compilers()
    size = (7.0 if "torch" in missing else 0.5) * machine.GIB
    machine.require_space({environment.prefix: size, cache_folder(): _BUILD_SPACE})
    with exclusive(environment.prefix / ".pipeline-setup.lock"):
        missing = libraries.missing(lock, environment, torch)
        if missing:
            say(f"Python libraries: {len(missing)} of {len(libraries.applicable(lock))} are to be installed")
            libraries.install(lock_file, environment, torch, nvidia_driver=machine.has_nvidia_driver())
        left = libraries.missing(lock, environment, torch)
    if left:
        raise PipelineError(f"{environment.prefix}: these libraries are still not there: {', '.join(left)}")
    return True


# Source, objects, programs, Go's caches: measured, and rounded up.
_BUILD_SPACE = 2.5 * 2**30


def set_up_programs(dev: bool) -> list[str]:
    """Fetch and build what is not a Python library; the main job's needs first.

    Returns:
        What could not be had and is not needed for a run to end well.
    """
    from pipeline.resources import cache_folder
    from pipeline.setup import toolchain
    from pipeline.setup.pins import load_pins
    from pipeline.setup.processes import exclusive

    pins = load_pins()
    folder = toolchain.source_home(pins.llama_cpp) / "bin"
    wanted = [
        *(folder / name for name in (*pins.llama_cpp.first, *pins.llama_cpp.later)),
        toolchain.package_file(pins.packaged_base),
        toolchain.ollama_home(pins.ollama) / "bin" / "ollama",
        *(toolchain.tokenizer_home(pin) for pin in pins.tokenizers.values() if dev),
    ]
    if all(path.exists() for path in wanted):
        return []
    with exclusive(cache_folder() / "setup.lock") as lock:
        return _build(pins, dev, folder, lock)


def _build(pins: Pins, dev: bool, folder: Path, lock: int) -> list[str]:
    from pipeline.console import say
    from pipeline.resources import cache_folder
    from pipeline.setup import machine, toolchain
    from pipeline.setup.build import build_programs
    from pipeline.setup.fetch import fetch_node, fetch_package
    from pipeline.setup.ollama import build_ollama
    from pipeline.setup.processes import find_program

    warnings = []
    if not all((folder / name).is_file() for name in (*pins.llama_cpp.first, *pins.llama_cpp.later)):
        machine.require_compilers()
        machine.require_space({cache_folder(): _BUILD_SPACE})
    build_programs(pins.llama_cpp, pins.llama_cpp.first, [lock])
    fetch_package(pins.packaged_base, toolchain.package_file(pins.packaged_base), source=False)
    own = None if dev else machine.system_ollama(pins.ollama.version)
    if own is not None:
        say(f"Ollama: using this machine's own, {own[0]} ({own[1]})")
    elif find_program("go") is None and toolchain.ollama_program() is None:
        warnings.append(
            f"there is neither Go nor an Ollama {pins.ollama.version} or newer here: nothing to deploy to. "
            "All the rest works, and `deploy` says what to type elsewhere. "
            "With Go installed, `pipeline setup` builds Ollama"
        )
    else:
        build_ollama(pins.ollama, folder, [lock])
    build_programs(pins.llama_cpp, pins.llama_cpp.later, [lock])
    if dev and find_program("npm") is None:
        warnings.append(
            "there is no npm here, so tests with the tokenizers of Qwen, Llama and Gemma are skipped"
        )
    elif dev:
        for pin in pins.tokenizers.values():
            fetch_node(pin, toolchain.tokenizer_home(pin))
    # Objects are of no use once all programs are there.
    shutil.rmtree(toolchain.source_home(pins.llama_cpp) / "build", ignore_errors=True)
    return warnings

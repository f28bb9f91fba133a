"""The code that a stage runs, as a digest of each module: what can change its result, and nothing else.

Comments, docstrings and layout have no part in it, nor has what is imported for types alone, nor a module that cannot
change what a stage writes (`NO_PART`): a stage that took hours is not run again for the colour of a curve.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from functools import cache
from pathlib import Path
from typing import TypeGuard

# Modules and packages that have no part in a result, and why.
NO_PART = {
    "pipeline.config": "a stage depends on the values that it reads, held for themselves; no rule stands there",
    "pipeline.console": "what a person sees while it works",
    "pipeline.defaults": "the values that it fills in are held for themselves",
    "pipeline.errors": "a stage that fails leaves no result",
    "pipeline.figures": "how figures are written for a person",
    "pipeline.model.card": "the look of the adapter's README",
    "pipeline.model.quiet": "which remarks of a library are shown",
    "pipeline.plots": "the look of the curves",
    "pipeline.processes": "how programs are started; which ones is held by their pins",
    "pipeline.resources": "where the program's own files lie; those that a stage reads are held for themselves",
    "pipeline.run": "where results are kept, for all stages alike",
    "pipeline.setup": "how libraries and programs come here; their versions are held for themselves",
    "pipeline.toml_file": "how the values are read; a stage depends on them alone",
}
# And what among them has a part all the same.
PART = {"pipeline.setup.ollama_version": "the oldest Ollama that serves a model is written into its Modelfile"}


def code_of(module: str) -> dict[str, str]:
    """The digest of a module and of every module of its program that it imports, by their names.

    Args:
        module: an imported module; its program is its top-level package.
    """
    return code_in(packages_of(module), module)


def packages_of(module: str) -> Path:
    """The folder in which the top-level package of an imported module lies."""
    file = sys.modules[module].__file__
    assert file is not None
    return Path(file).resolve().parents[module.count(".")]


def code_in(root: Path, module: str) -> dict[str, str]:
    """The same for a module that need not be imported.

    Args:
        root: the folder in which top-level packages lie.
        module: a module below it.
    """
    package = module.partition(".")[0]
    digests: dict[str, str] = {}
    names, known = [module], {module}
    leaves: set[str] = set()  # modules that are no packages, so that what is in them is no module
    for name in names:  # it grows
        if name.partition(".")[0] != package or name.rpartition(".")[0] in leaves or _no_part(name):
            continue
        path = _source(root, name)
        if path is None:
            continue
        if path.stem != "__init__":
            leaves.add(name)
        status = path.stat()
        digests[name], imports = _read(path, status.st_mtime_ns, status.st_size)
        names += [one for one in imports if one not in known]
        known.update(imports)
    return dict(sorted(digests.items()))


def _no_part(name: str) -> bool:
    return name not in PART and any(name == known or name.startswith(f"{known}.") for known in NO_PART)


def _source(root: Path, name: str) -> Path | None:
    """The file of a module, or a package's own; None for what is neither, such as a name in a module."""
    place = root.joinpath(*name.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@cache
def _read(path: Path, mtime_ns: int, size: int) -> tuple[str, tuple[str, ...]]:
    """A source file's digest, and the names that it may import; its time and size say whether an answer still holds."""
    tree = ast.parse(path.read_bytes())
    imports: list[str] = []
    _leave_what_runs(tree, imports)
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16], tuple(imports)


def _leave_what_runs(block: ast.AST, imports: list[str]) -> None:
    """Take docstrings, imports for types and all but the function of a stage's declaration out; collect imports."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        statements = getattr(block, name, None)
        if not isinstance(statements, list):  # a lambda's body is an expression
            continue
        if name == "body" and isinstance(block, _WITH_DOCSTRING) and ast.get_docstring(block, clean=False) is not None:
            del statements[0]
        statements[:] = [statement for statement in statements if not _for_types(statement)]
        for statement in statements:
            if isinstance(statement, ast.ImportFrom) and statement.module and statement.level == 0:
                imports.append(statement.module)
                imports += [f"{statement.module}.{alias.name}" for alias in statement.names]  # it may be a module
            elif isinstance(statement, ast.Import):
                imports += [alias.name for alias in statement.names]
            elif isinstance(statement, ast.Assign) and _is_declaration(statement.value):
                statement.value.keywords = [word for word in statement.value.keywords if word.arg == "run"]
            else:
                _leave_what_runs(statement, imports)


_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _for_types(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.If) and isinstance(statement.test, ast.Name) and statement.test.id == "TYPE_CHECKING"
    )


def _is_declaration(value: ast.expr) -> TypeGuard[ast.Call]:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "Stage"

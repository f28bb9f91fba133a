"""What `pipeline verify` does beside running the stage: a run's folder as it is, an export, a table."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


@dataclass(frozen=True)
class Export:
    """What another program made, as it is given.

    Attributes:
        hf: the Hugging Face folder.
        gguf: the GGUF file that was made from it.
        ollama: the name of a model in Ollama that was made from it; where no file is given, its file is taken.
        adapter: the adapter that the folder is said to have merged.
        base: its base; without it the one that the adapter names.
    """

    hf: Path | None
    gguf: Path | None = None
    ollama: str | None = None
    adapter: Path | None = None
    base: str | None = None

    @property
    def given(self) -> bool:
        """Whether anything is."""
        return any(value is not None for value in vars(self).values())


def verify_export(export: Export, stages: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """verify.json of an export of another program.

    Args:
        export: what is given of it.
        stages: the stages whose outputs are judged, in the order of the work.
        overrides: "verify.key=value" strings.

    Raises:
        UserError: one of them is not there, one is given without what it belongs to, or an override is none.
    """
    from pipeline.verify.artefacts import Artefacts
    from pipeline.verify.chain import EXPORT_CHECKS
    from pipeline.verify.chain import verify as run
    from pipeline.verify.in_ollama import file_of

    hf, gguf = export.hf, export.gguf
    if hf is None or (gguf is None and export.ollama is None):
        raise UserError("--hf and --gguf, or --ollama, belong together: the folder, and the GGUF file made from it")
    if export.base is not None and export.adapter is None:
        raise UserError("--base belongs to --adapter: the base of the adapter that was merged")
    gguf = gguf or file_of(str(export.ollama))
    with tempfile.TemporaryDirectory(prefix="pipeline-verify-") as scratch:
        artefacts = Artefacts.of_export(hf.absolute(), gguf.absolute(), _settings({}, overrides), Path(scratch))
        if export.adapter is not None:
            artefacts.add_adapter(export.adapter.absolute(), export.base)
        artefacts.ollama = export.ollama
        return run(artefacts, stages, EXPORT_CHECKS)


def verify_folder(run_folder: Path, stages: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """verify.json of a run's folder as it is; it is written there too. The run may have been moved.

    Raises:
        UserError: there is no merged model in it, or an override is none.
    """
    from pipeline.run.layout import Layout
    from pipeline.toml_file import read_run
    from pipeline.verify.artefacts import Artefacts
    from pipeline.verify.chain import verify as run
    from pipeline.verify.result import write

    settings = read_run(run_folder)
    settings = settings.model_copy(update={"verify": _settings(settings.verify.model_dump(), overrides)})
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=run_folder) as scratch:  # as large as the model
        content = run(Artefacts.of_run(run_folder, settings, Path(scratch)), stages)
    target = Layout(run_folder).verify_json
    target.parent.mkdir(exist_ok=True)
    write(target, content)
    return content


def _settings(values: dict[str, Any], overrides: Sequence[str]) -> Any:
    """[verify] alone, with --set verify.key=value."""
    from pydantic import ValidationError

    from pipeline.config import Verify
    from pipeline.toml_file import parse_override

    given = dict(values)
    for override in overrides:
        key, value = parse_override(override)
        section, _, name = key.partition(".")
        if section != "verify" or name not in Verify.model_fields:
            known = ", ".join(f"verify.{field}" for field in Verify.model_fields)
            raise UserError(f"--set {override}: here only thresholds can be set: {known}")
        given[name] = value
    try:
        return Verify.model_validate(given)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        raise UserError(f"verify.{detail['loc'][0]} = {detail['input']!r}: {detail['msg']}") from None


def show(content: dict[str, Any]) -> None:
    """The table on standard output, and the first broken stage in words."""
    from pipeline.console import results
    from pipeline.verify.result import FAIL, explain, summary, table

    console = results()
    console.print(table(content))
    console.print(f"\n{summary(content)}")
    if content["verdict"] == FAIL:
        console.print(explain(content), style="bold red", markup=False, soft_wrap=True)

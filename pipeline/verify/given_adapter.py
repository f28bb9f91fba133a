"""adapter: one that was trained elsewhere belongs to its base, and what its folder cannot say is named.

What was read when it was taken in is read again here, of what every later stage was made from.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.model.adapter_folder import WEIGHTS, fit_to, read_given_adapter
from pipeline.model.combined_adapter import difference, read_given_adapters, write_combined
from pipeline.resources import sha256_of
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result
from pipeline.verify.training import trainings_of

_ROUNDING = 1e-4  # of float32's sums, relative
_FITS = Claim("adapter.fits", "train", "every tensor of the adapter has its place in the base, and is finite")
_SAME = Claim("adapter.same", "train", "its tensors are those of the folder that was given, or of all of them combined")
_DATA = Claim("adapter.data", "train", "the rows that it was trained on are known")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_PROMPT = Claim("adapter.prompt", "train", "the chat template that it was trained with is known")


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Judge an adapter from elsewhere; one that was trained here is judged by what its training wrote down."""
    given, adapter, base = artefacts.given, artefacts.adapter, artefacts.base
    if not given or base is None:
        return
    try:
        found = read_given_adapter(adapter or given[0])
        fit = fit_to(found, base)
    except UserError as error:
        yield _FITS.holds(False, str(error))
        return
    yield _FITS.holds(True, figure=f"{len(fit.modules)} modules, rank {found.settings['r']}")
    gone = [folder for folder in given if not (folder / WEIGHTS).is_file()]
    if adapter is None or gone:
        yield _SAME.not_run(f"{(gone or given)[0]} is not there any more")
    elif artefacts.config is not None and artefacts.config.adapters:
        yield _combined_again(artefacts, artefacts.config, adapter)
    else:
        same = sha256_of(given[0] / WEIGHTS) == sha256_of(adapter / WEIGHTS)
        yield _SAME.holds(same, f"{given[0] / WEIGHTS} is another file now")
    if isinstance(trainings := trainings_of(artefacts), str):
        yield _DATA.not_run(f"{trainings}; with questions of your own (--data, data.test) every rung is asked")
    else:
        yield _DATA.holds(True)
    if all(any((folder / name).is_file() for name in _TEMPLATES) for folder in given):
        yield _PROMPT.holds(True)
    else:
        yield _PROMPT.not_run(
            "a folder has none of its own; what is judged is the one that was taken instead (--template, "
            "model.chat_template)"
        )


def _combined_again(artefacts: Artefacts, config: Config, adapter: Path) -> Result:
    """By what each adds to a module: another machine may give the factors of a decomposition other signs."""
    folder = artefacts.scratch / "combined-again"
    try:
        again = write_combined(config, read_given_adapters(config), folder)
        found = difference(again, read_given_adapter(adapter))
    except UserError as error:
        return _SAME.holds(False, str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    words = "what the adapters are combined to now is another one"
    return _SAME.holds(found <= _ROUNDING, words, f"{found:.1e}", f"at most {_ROUNDING}")

"""adapter: one that was trained elsewhere belongs to its base, and what its folder cannot say is named.

What was read when it was taken in is read again here, of what every later stage was made from.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.errors import UserError
from pipeline.model.adapter import WEIGHTS, fit_to, read_given_adapter
from pipeline.resources import sha256_of
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result

_FITS = Claim("adapter.fits", "train", "every tensor of the adapter has its place in the base, and is finite")
_SAME = Claim("adapter.same", "train", "its tensors are those of the folder that was given")
_DATA = Claim("adapter.data", "train", "the rows that it was trained on are known")
_PROMPT = Claim("adapter.prompt", "train", "the chat template that it was trained with is known")


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Judge an adapter from elsewhere; one that was trained here is judged by what its training wrote down."""
    given, adapter, base = artefacts.given, artefacts.adapter, artefacts.base
    if given is None or base is None:
        return
    try:
        found = read_given_adapter(adapter or given)
        fit = fit_to(found, base)
    except UserError as error:
        yield _FITS.holds(False, str(error))
        return
    yield _FITS.holds(True, figure=f"{len(fit.modules)} modules, rank {found.settings['r']}")
    if adapter is not None and (given / WEIGHTS).is_file():
        yield _SAME.holds(
            sha256_of(given / WEIGHTS) == sha256_of(adapter / WEIGHTS), f"{given / WEIGHTS} is another file now"
        )
    else:
        yield _SAME.not_run(f"{given} is not there any more")
    yield _DATA.not_run("an adapter does not say; with questions of your own (--data, data.test) every rung is asked")
    if any((given / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        yield _PROMPT.holds(True)
    else:
        yield _PROMPT.not_run(
            "its folder has none of its own; what is judged is the one that was taken instead (--template, "
            "model.chat_template)"
        )

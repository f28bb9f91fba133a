"""merge base: an adapter that was trained on 4-bit weights was merged into those weights that it fits.

The merge stage has measured the held-out loss on both before it chose; taking it again would cost as
much as all other checks. That the merged model is what was measured shows in its own loss (`answers`).
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result
from pipeline.verify.rungs import ADAPTER, ADAPTER_16BIT, BASE

_CLAIM = Claim("merge_base.better", "merge", "the adapter is merged into the base that it fits")


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Judge the choice by the losses."""
    losses, taken = artefacts.merge_losses, artefacts.merged_into
    if artefacts.run is None:
        yield _CLAIM.not_run("the base and the adapter of this export are not known")
    elif artefacts.config is not None and artefacts.config.merge.model is not None:
        yield _CLAIM.not_run(f"merge.model names the weights that it is merged into: {artefacts.config.merge.model}")
    elif not artefacts.trained_on_4bit:
        yield _CLAIM.not_run("there is only one base that the adapter could be merged into")
    elif not losses and artefacts.config is not None and artefacts.config.merge.base != "auto":
        yield _CLAIM.not_run(f'merge.base = "{artefacts.config.merge.base}": nothing was measured')
    elif not losses:
        yield _CLAIM.not_run("there are no held-out answers")
    else:
        if artefacts.merge_measured_all:  # else they say nothing beside losses that were taken on more rows
            artefacts.shared.setdefault("losses", {}).update(
                {BASE: losses["base"], ADAPTER: losses["dequantized"], ADAPTER_16BIT: losses["16bit"]}
            )
        other = "dequantized" if taken == "16bit" else "16bit"
        words = (
            f'merged into "{taken}" the held-out loss is {losses[taken]:.4f}, into "{other}" {losses[other]:.4f}; '
            'merge.base = "auto" takes the better'
        )
        yield _CLAIM.at_most(losses[taken] - losses[other], artefacts.settings.loss_lost, words)

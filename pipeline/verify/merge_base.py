"""merge base: an adapter that was trained on 4-bit weights was merged into those weights that it fits.

The merge stage has measured the held-out loss on both before it chose; taking it again would cost as
much as all other checks. That the merged model is what was measured shows in its own loss (`answers`).
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.model.merge_target import chosen_base
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result
from pipeline.verify.rungs import ADAPTER, ADAPTER_16BIT, BASE

_CLAIM = Claim("merge_base.better", "merge", "the adapter is merged into the base that it fits")


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Judge the choice by the losses."""
    losses, taken = artefacts.merge_losses, artefacts.merged_into
    chosen = chosen_base(artefacts.config) if artefacts.config is not None else None
    if artefacts.run is None:
        yield _CLAIM.not_run("the base and the adapter of this export are not known")
    elif chosen is not None:
        yield _CLAIM.not_run(f"nothing was measured: {chosen[1]}")
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

"""merge base: an adapter that was trained on 4-bit weights may fit those better than the 16-bit ones; so measure both.

The dequantized NF4 weights are what the adapter saw; the 16-bit ones are what the base really is. People disagree which
to merge into, because it depends on the model and on the data: the held-out loss decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.chat.labels import IGNORED
from pipeline.console import progress
from pipeline.model.predict import predict
from pipeline.verify.logits import loss_of, trained_places
from pipeline.verify.result import Claim, Result
from pipeline.verify.subject import Subject

SIXTEEN_BIT, DEQUANTIZED = "16bit", "dequantized"
_CLAIM = Claim("merge_base.better", "merge", "the adapter is merged into the base that it fits better")


def check(subject: Subject) -> Iterator[Result]:
    """Measure the loss of both, and judge the one that was taken."""
    if subject.run is None or subject.base is None or subject.adapter is None or subject.config is None:
        yield _CLAIM.not_run("the base and the adapter of this export are not known")
        return
    if not subject.trained_on_4bit:
        yield _CLAIM.not_run("the adapter was trained on the 16-bit base: there is only one base")
        return
    rows = subject.compared_rows()
    if not any(label != IGNORED for _, labels in rows for label in labels):
        yield _CLAIM.not_run("there are no held-out answers")
        return
    losses = measure(subject.base, subject.adapter, rows)
    subject.shared.setdefault("losses", {}).update(
        {
            "base": losses["base"],
            "adapter on 4-bit": losses[DEQUANTIZED],
            "adapter on 16-bit": losses[SIXTEEN_BIT],
        }
    )
    taken = subject.merged_into
    other = DEQUANTIZED if taken == SIXTEEN_BIT else SIXTEEN_BIT
    words = (
        f'merged into "{taken}" the held-out loss is {losses[taken]:.4f}, into "{other}" {losses[other]:.4f}; '
        'train longer, or on the 16-bit base (train.load_in_4bit = false)'
    )
    yield _CLAIM.at_most(losses[taken] - losses[other], subject.settings.loss_lost, words)


def measure(base: Path, adapter: Path, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, float]:
    """Held-out loss in nats for each trained token, in float32: of the base, and of the adapter on both bases."""
    from peft import PeftModel

    from pipeline.model.predict import load_float32

    model = load_float32(base)
    losses = {"base": _loss(model, rows, "base")}
    model = PeftModel.from_pretrained(model, adapter).eval()
    losses[SIXTEEN_BIT] = _loss(model, rows, "adapter on 16-bit")
    dequantize_targets(model)
    losses[DEQUANTIZED] = _loss(model, rows, "adapter on 4-bit")
    return losses


def dequantize_targets(model: Any) -> None:
    """Replace the base's weights under each adapter by what NF4 keeps of them."""
    import torch
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                weight = module.get_base_layer().weight
                weight.copy_(dequantized(weight.float()).to(weight.dtype))


def dequantized(weight: Any) -> Any:
    """What NF4 with double quantization keeps of a matrix (T. Dettmers et al., 2023, "QLoRA", section 3), float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values, state = quantize_4bit(
        weight.float().contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return dequantize_4bit(values, state).float()


def _loss(model: Any, rows: Sequence[tuple[list[int], list[int]]], what: str) -> float:
    total, trained = 0.0, 0
    left = iter(rows)
    with progress(f"held-out loss, {what}", len(rows), "rows") as update:
        batches = predict(model, [ids for ids, _ in rows])
        for number, logits in enumerate(itertools.chain.from_iterable(batches), 1):
            ids, labels = next(left)
            places = trained_places(labels)
            total += loss_of(logits, ids, places)
            trained += len(places)
            update(number)
    return total / max(1, trained)

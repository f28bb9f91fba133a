"""The ladder: every rung at which a model is asked or measured, in the order of the work.

`verify.json` and the report name losses, divergences and answers by these. A check names what it judges by the stage,
and its variant, that made it: `made_by` says which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.model.merge_target import has_two_bases

if TYPE_CHECKING:
    from pipeline.config import Config

BASE = "base"  # untouched
ADAPTER = "adapter"  # on the base that it was trained on
ADAPTER_16BIT = "adapter-16bit"  # on the base as it is stored, where it was trained on 4 bits
MERGED = "merged"
GGUF_16BIT = "gguf-16bit"
OLLAMA = "ollama"  # the first quantized file as Ollama serves it
_ALONE = "alone-"  # one of several adapters, on the base
_MADE_BY = {
    BASE: "base", ADAPTER: "train", ADAPTER_16BIT: "train", MERGED: "merge", GGUF_16BIT: "convert", OLLAMA: "deploy",
}  # fmt: skip


def alone(name: str) -> str:
    """The rung of one of several adapters that are combined, by its name."""
    return f"{_ALONE}{name}"


def is_alone(rung: str) -> bool:
    """Whether one of several adapters is asked at a rung."""
    return rung.startswith(_ALONE)


def rungs(config: Config) -> tuple[str, ...]:
    """The rungs of a run. Each quantization type is one, and so is each of the adapters that are combined, alone."""
    combined = (alone(adapter.called) for adapter in config.adapters)
    adapters = (*combined, ADAPTER, *((ADAPTER_16BIT,) if has_two_bases(config) else ()))
    return (BASE, *adapters, MERGED, GGUF_16BIT, *config.export.quant, OLLAMA)


def made_by(rung: str) -> str:
    """The stage, with its variant, whose output is asked at a rung, e.g. "quantize/q4_k_m" at q4_k_m."""
    return "train" if is_alone(rung) else _MADE_BY.get(rung, f"quantize/{rung}")

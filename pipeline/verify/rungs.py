"""The ladder: every rung at which the test questions are asked, in the order of the work."""

from collections.abc import Sequence

BASE = "base"  # untouched
ADAPTER = "adapter"  # on the base that it was trained on
ADAPTER_16BIT = "adapter-16bit"  # on the base as it is stored, where it was trained on 4 bits
MERGED = "merged"
GGUF_16BIT = "gguf-16bit"
OLLAMA = "ollama"  # the first quantized file as Ollama serves it


def rungs(types: Sequence[str], *, trained_on_4bit: bool) -> tuple[str, ...]:
    """The rungs of a run; each quantization type is one.

    Args:
        types: names of quantization types.
        trained_on_4bit: the adapter has two bases to be asked on.
    """
    return (BASE, ADAPTER, *((ADAPTER_16BIT,) if trained_on_4bit else ()), MERGED, GGUF_16BIT, *types, OLLAMA)

"""quantization: is the file what its name promises? The type of every tensor, the bits it takes, and how much it lost.

What the name stands for on this very model is asked of the pinned llama-quantize, which can say it without quantizing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from pipeline.console import progress
from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.gguf_file import GGUFInfo, inspect
from pipeline.llamacpp.gguf_file import check as check_gguf
from pipeline.llamacpp.quantizer import QuantizationType, dry_run, quantization_type
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import Claim, Result

# The largest relative error of a tensor by the bits that a type promises, three times what the example's worst has:
# Q8_0 0.0065, Q6_K 0.017, Q5_K_M 0.041, Q5_0 0.054, Q4_K_M 0.062, Q4_0 0.10, Q3_K_S 0.16, IQ3_M 0.19.
_ERRORS = ((16.0, 0.005), (8.0, 0.02), (6.0, 0.05), (5.0, 0.15), (4.0, 0.3), (3.0, 0.5), (0.0, 0.8))


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Judge every quantized file."""
    if not artefacts.quantized:
        claim = Claim("quantization.types", "quantize", "every tensor has the type that the name stands for")
        yield claim.not_run("no file is quantized")
    for kind, path in artefacts.quantized.items():
        yield from _file(artefacts, kind, path)


def _file(artefacts: Artefacts, kind: str, path: Path) -> Iterator[Result]:
    stage = f"quantize/{kind}"
    whole = Claim("quantization.file", stage, "the file is whole, and no tensor is NaN or all zeros")
    types = Claim("quantization.types", stage, "every tensor has the type that the name stands for")
    try:
        info = check_gguf(path)
    except PipelineError as error:
        yield whole.holds(False, str(error))
        try:
            info = inspect(path)
        except PipelineError:
            yield types.not_run("the file is not whole")
            return
    else:
        yield whole.holds(True)
    try:
        wanted = quantization_type(kind)
    except UserError:
        yield types.holds(False, f"neither its name nor general.file_type says what {path.name} is")
        return
    meant = dry_run(artefacts.reference, wanted.name)
    yield _named(stage, info, wanted)
    yield _types(types, info, meant.types)
    yield from _bits(stage, artefacts, info, wanted, [fallback.tensor for fallback in meant.fallbacks])
    yield _error(stage, artefacts, info, wanted)


def _named(stage: str, info: GGUFInfo, wanted: QuantizationType) -> Result:
    number = info.metadata.get("general.file_type")
    claim = Claim("quantization.name", stage, "the file says that it is of the type that it is named after")
    return claim.holds(
        number == wanted.number,
        f"general.file_type is {number}, {wanted.name} is {wanted.number}",
        number,
        wanted.number,
    )


def _types(claim: Claim, info: GGUFInfo, meant: dict[str, str]) -> Result:
    found = {tensor.name: tensor.type for tensor in info.tensors}
    wrong = [
        f"{name} is {found.get(name, 'missing')} instead of {kind}"
        for name, kind in meant.items()
        if found.get(name, "").lower() != kind.lower()
    ]
    more = f" ({len(wrong)} of {len(meant)} tensors)" if wrong else ""
    return claim.holds(not wrong, "; ".join(wrong[:2]) + more, len(wrong), "at most 0 tensors")


def _bits(
    stage: str, artefacts: Artefacts, info: GGUFInfo, wanted: QuantizationType, fallen: list[str]
) -> Iterator[Result]:
    bits = Claim("quantization.bits", stage, "a weight has at least the bits that the name promises")
    if wanted.promised_bits is None:
        yield bits.not_run(f"llama-quantize does not say what {wanted.name} promises")
    else:
        # A name's bits are an average over one model; another mix of sizes comes out a little lower.
        least = 0.9 * wanted.promised_bits
        words = f"{info.bits_per_weight:.2f} bits a weight, where {wanted.name} promises {wanted.promised_bits:.2f}"
        yield bits.at_least(info.bits_per_weight, least, words)
    share = sum(info.names[name].elements for name in fallen if name in info.names) / max(1, info.parameter_count)
    claim = Claim("quantization.fallback", stage, "no more parameters fell back to another type than may")
    yield claim.at_most(
        share, artefacts.settings.fallback, f"{share:.0%} of the parameters have rows that do not fit {wanted.name}"
    )


def _error(stage: str, artefacts: Artefacts, info: GGUFInfo, wanted: QuantizationType) -> Result:
    """The relative error of the worst tensor, dequantized, against the 16-bit file."""
    import numpy as np

    reference = inspect(artefacts.reference)
    claim = Claim("quantization.error", stage, "every tensor is near the 16-bit one")
    worst, words = 0.0, ""
    with progress(f"numbers of {stage}", len(info.tensors), "tensors") as update:
        for number, tensor in enumerate(info.tensors, 1):
            theirs = reference.names.get(tensor.name)
            if theirs is None or theirs.shape != tensor.shape:
                return claim.holds(False, f"{tensor.name} is not in the 16-bit file, or has another shape there")
            size = difference = 0.0
            for meant, found in zip(reference.pieces(theirs), info.pieces(tensor), strict=True):
                size += float(np.linalg.norm(meant)) ** 2
                difference += float(np.linalg.norm(found - meant)) ** 2
            error = math.sqrt(difference / size) if size else 0.0
            if math.isnan(error):
                return claim.holds(False, f"{tensor.name} holds what is no number")
            if error > worst:
                worst, words = error, f"{tensor.name} is {error:.2f} of its size away"
            update(number)
    bits = wanted.promised_bits or info.bits_per_weight
    limit = artefacts.settings.quantization_error or next(limit for least, limit in _ERRORS if bits >= least)
    return claim.at_most(worst, limit, words)

"""logits: the same next-token distribution, position by position, at every step from the merged model to the last file.

The merged model in float32 is the measure for the 16-bit file, computed exactly on both sides; the 16-bit file is the
measure for the quantized ones, in llama.cpp's own statistics. Where an adapter is served on its base, every file is
used with it, and the quantized ones are held against the merged model as a 16-bit file. The perplexity of the base
against the tuned model says nothing about either, and is not taken. How many tokens are compared:
`pipeline.model.held_out.compared_tokens`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.console import progress
from pipeline.errors import NotInstalled, PipelineError
from pipeline.figures import size
from pipeline.llamacpp.divergence import Divergence, DivergenceStatistics, compare_files
from pipeline.llamacpp.gguf_file import inspect
from pipeline.llamacpp.library import LlamaModel
from pipeline.llamacpp.llama_server import LlamaServer
from pipeline.llamacpp.perplexity import LEAST_POSITIONS, compare, scored_positions, write_reference
from pipeline.llamacpp.quantizer import quantize
from pipeline.model import memory
from pipeline.model.adapter_file import read_adapter
from pipeline.model.held_out import RowLoss, mean_loss, row_loss, trained_places
from pipeline.model.layer_by_layer import Layers
from pipeline.model.load import load_float32, round_matrices, rounded
from pipeline.model.memory import fits_float32
from pipeline.model.merging import MergedWeights
from pipeline.model.nf4 import Record
from pipeline.model.predict import predict
from pipeline.model.weights_file import read_weights, torch_type
from pipeline.processes import cores, require_space
from pipeline.setup import machine
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.reconvert import unquantized_type
from pipeline.verify.result import Claim, Result
from pipeline.verify.rungs import GGUF_16BIT, MERGED, made_by

CHUNK = 512  # tokens that llama-perplexity takes at once; it scores the second half of each
# By how much the limits are wider where llama.cpp computes in a file's own type (`_in_float32` says what that does).
# The packaged base in float16 stays within a tenth of the limits for float32; in bfloat16 its mean is 1e-4 and more.
_WIDER = {"bf16": 10.0}
_REFERENCE = "reference.bin"
_ENOUGH = 200  # positions below which a divergence says little

# The largest mean divergence by the bits that a type promises: four times or more of what the example loses, a small
# model, which loses most: Q8_0 0.002, Q6_K 0.005, Q5_K_M 0.03, Q5_0 and Q4_K_M 0.05, Q4_0 0.25, Q3_K_S 0.26, IQ3_M 0.8.
_LIMITS = ((16.0, 1e-3), (8.0, 0.01), (6.0, 0.03), (5.0, 0.2), (4.8, 0.3), (4.0, 1.0), (3.0, 3.5), (0.0, 6.0))


Rows = list[tuple[list[int], list[int]]]
# Logits of rows. It is given what to call with the share that is done, where that is known before the first row is.
Predicted = Callable[[Callable[[float], None]], Iterator[Any]]


def check(artefacts: Artefacts) -> Iterator[Result]:
    """Judge the 16-bit file, then the quantized ones."""
    yield from _sixteen_bit(artefacts)
    yield from _quantized(artefacts)


def _sixteen_bit(artefacts: Artefacts) -> Iterator[Result]:
    settings = artefacts.settings
    mean = Claim("logits.mean", "convert", "the 16-bit GGUF file predicts what the merged model predicts (mean KL)")
    tail = Claim("logits.tail", "convert", "it does so at nearly every position (99.9th percentile of KL)")
    top = Claim("logits.top", "convert", "both think the same token the likeliest")
    lead = Claim("logits.lead", "convert", "where they do not, it was a close call (lead in log probability)")
    claims = (mean, tail, top, lead)
    path = artefacts.sixteen_bit
    if path is None:
        yield from (claim.not_run("there is no unquantized GGUF file") for claim in claims)
        return
    rows = artefacts.compared_rows()
    adapter = artefacts.gguf_adapter
    if why := _cannot_load(path, adapter) or _cannot_compare(artefacts, path):
        yield mean.holds(False, why)
        yield from (claim.not_run("no logits could be compared") for claim in claims[1:])
        return
    kind = unquantized_type(path) or ""
    folder = artefacts.base if artefacts.removed and artefacts.base is not None else artefacts.model
    in_memory = artefacts.shared.get("model") is not None or fits_float32(folder)
    unrounded = _of_sum(artefacts, kind, rows) if adapter else None
    reference: Predicted | str
    if unrounded is not None:
        reference = unrounded
    else:
        loaded = in_memory and not artefacts.removed
        reference = _of_loaded(artefacts, kind, rows) if loaded else _of_layers(folder, _tensors(artefacts, kind), rows)
    if isinstance(reference, str):
        yield from (claim.not_run(reference) for claim in claims)
        return
    exact = _in_float32(path, artefacts.scratch) if in_memory else path
    divergence, losses = _diverge(reference, exact, adapter, rows, artefacts.held_out[0])
    if exact != path:
        exact.unlink()
    artefacts.shared["model"] = None
    more = _WIDER.get(kind, 1.0) if not in_memory or (adapter and unrounded is None) else 1.0
    artefacts.shared.setdefault("losses", {}).update(losses)
    where = f"over {divergence.positions:,} positions of {artefacts.held_out[0]}"
    if unrounded is not None:
        where += ", before the merge rounded it"
    if more > 1:
        why = f"the model is too large for float32, and was computed in {kind}"
        if in_memory:
            why = f"the merge rounded to {kind} what llama.cpp adds up unrounded"
        where += f" (limits are {more:g} times wider: {why})"
    artefacts.shared["divergences"] = {GGUF_16BIT: divergence.mean}
    yield mean.at_most(divergence.mean, more * settings.divergence, f"mean KL {divergence.mean:.2g} {where}")
    high = divergence.quantile(0.999)
    yield tail.at_most(
        high,
        more * settings.divergence_999,
        f"the 99.9th percentile of KL is {high:.2g} {where}, a log probability differs by up to "
        f"{divergence.largest_difference:.2g}",
    )
    words = f"the likeliest token is the same at {divergence.same_top:.2%} {where}"
    yield top.at_least(divergence.same_top, 1 - min(more, 4) * (1 - settings.same_top), words)
    lost = divergence.largest_lead_lost
    yield lead.at_most(lost, more * settings.lead, f"a token that led by {lost:.3g} is no longer the likeliest")


def _of_loaded(artefacts: Artefacts, kind: str, rows: Rows) -> Predicted:
    """Logits of the merged model, loaded in float32."""
    model = artefacts.shared.get("model") or load_float32(artefacts.model)
    round_matrices(model, artefacts.model, kind)
    return lambda update: predict(model, [ids for ids, _ in rows])


def _of_sum(artefacts: Artefacts, kind: str, rows: Rows) -> Predicted | None:
    """Logits of the base and its adapter in float32, layer by layer: of the merged model before it was rounded.

    llama.cpp adds the adapter to what the base computes and rounds no sum, so that the rounded one would be no measure.
    None where that cannot be computed, as `_of_layers` says.
    """
    assert artefacts.base is not None
    assert artefacts.adapter is not None
    base = read_weights(artefacts.base)
    layers = Layers(base)
    if layers.lacking or memory.by_layers(base.own_shapes) > machine.free_memory():
        return None
    merged = MergedWeights(base, read_adapter(artefacts.adapter), Record.read(artefacts.adapter.parent))

    def tensor(name: str) -> Any:
        stored = rounded(base, name, kind)
        return stored + (merged[name] - base[name].float()) if name in merged.additions else stored

    return partial(layers.predict, tensor, [ids for ids, _ in rows])


def _tensors(artefacts: Artefacts, kind: str) -> Callable[[str], Any]:
    """The merged model's tensors, as a file of a type holds them; merged once more where they were removed."""
    if not artefacts.removed:
        stored = read_weights(artefacts.model)
        return lambda name: rounded(stored, name, kind)
    assert artefacts.base is not None
    assert artefacts.adapter is not None
    merged = MergedWeights(
        read_weights(artefacts.base),
        read_adapter(artefacts.adapter),
        Record.read(artefacts.adapter.parent),
        dequantize=artefacts.merged_into == "dequantized",
    )
    return lambda name: merged[name].to(torch_type(merged.type(name))).float()


def _of_layers(folder: Path, tensor: Callable[[str], Any], rows: Rows) -> Predicted | str:
    """The same layer by layer, for a model that does not fit into the memory; why that cannot be done, if it cannot."""
    weights = read_weights(folder)
    layers, needed = Layers(weights), memory.by_layers(weights.own_shapes)
    if layers.lacking:
        why = "for its size, or since merge.keep = false"
        return f"the model is not computed whole ({why}), and its files have no {layers.lacking[0]}"
    if needed > machine.free_memory():
        return f"the model's largest layer does not fit into the memory in float32 ({size(needed)})"
    return partial(layers.predict, tensor, [ids for ids, _ in rows])


def _in_float32(path: Path, scratch: Path) -> Path:
    """A 16-bit file's own numbers as float32; a float32 file itself.

    A CPU's llama.cpp rounds what it multiplies with 16-bit weights to their type: mean divergences of 2e-6 for float16
    and of 1e-4 for bfloat16 that say nothing of the file. In float32 a right one is 1e-11 away.
    """
    if unquantized_type(path) == "f32":
        return path
    target = scratch / f"{path.stem}-float32.gguf"
    require_space(scratch, memory.float32_file(inspect(path).parameter_count), "the 16-bit file's numbers as float32")
    quantize(path, target, "F32")
    return target


def _cannot_load(path: Path, adapter: Path | None = None) -> str:
    """Why llama.cpp cannot run a file. Tried in a process of its own: what it aborts on would end this one."""
    try:
        inspect(path)
        with LlamaServer(path, adapters=[adapter] if adapter else [], context=256) as server:
            server.complete([1, 1], 1)
    except NotInstalled:
        raise
    except PipelineError as error:
        return f"llama.cpp cannot run it: {error}"
    return ""


def _cannot_compare(artefacts: Artefacts, path: Path) -> str:
    config = artefacts.tokenizer
    vocabulary = len(inspect(path).metadata.get("tokenizer.ggml.tokens", ()))
    largest = max((max(ids) for ids, _ in artefacts.compared_rows() if ids), default=0)
    if largest >= vocabulary:
        return f"its vocabulary has {vocabulary:,} tokens, the trained one {len(config):,}"
    return ""


def _diverge(
    predicted: Predicted, path: Path, adapter: Path | None, rows: Rows, where: str
) -> tuple[Divergence, dict[str, float]]:
    """Compare what the merged model predicts on rows with what a file does, and take both losses on the way."""
    import numpy as np

    divergence = Divergence()
    total = sum(len(ids) for ids, _ in rows)
    losses: dict[str, list[RowLoss]] = {MERGED: [], GGUF_16BIT: []}
    done, before = 0, 0.0  # tokens of the file's, and of the model's where they are computed before the first row's
    longest = max(len(ids) for ids, _ in rows)
    left = iter(rows)
    with progress(f"logits of the merged model and of the 16-bit file on {where}", 2 * total, "tokens") as update:

        def of_model(share: float) -> None:
            nonlocal before
            before = share * total
            update(before + done)

        references = predicted(of_model)
        first = next(references)  # the two of a large model would take each other's place in the memory
        with LlamaModel(path, adapter=adapter, context=-(-longest // 256) * 256) as file:
            for reference in itertools.chain([first], references):
                ids, labels = next(left)
                other = file.logits(ids)
                if reference.shape[1] != other.shape[1]:  # an embedding may be padded beyond the vocabulary
                    width = min(reference.shape[1], other.shape[1])
                    reference, other = (np.ascontiguousarray(x[:, :width]) for x in (reference, other))
                divergence.add(reference, other)
                losses[MERGED].append(row_loss(reference, ids, labels))
                losses[GGUF_16BIT].append(row_loss(other, ids, labels))
                done += len(ids)
                update(max(before, done) + done)
    if not any(trained_places(labels) for _, labels in rows):
        return divergence, {}
    return divergence, {rung: mean_loss(found) for rung, found in losses.items()}


def _quantized(artefacts: Artefacts) -> Iterator[Result]:
    if not artefacts.quantized:
        return
    broken = _cannot_load(artefacts.merged_reference)
    measure = None if broken else _measure(artefacts)
    for kind, path in artefacts.quantized.items():
        claim = Claim("logits.quantized", made_by(kind), "quantizing changed the predictions little (mean KL)")
        if measure is None:
            yield claim.not_run(f"the 16-bit file cannot be run: {broken}")
        elif why := _cannot_load(path, artefacts.gguf_adapter):
            yield claim.holds(False, why)
        else:
            try:
                yield _judged(artefacts, claim, kind, measure(path))
                if artefacts.without_metric:
                    artefacts.shared.setdefault("losses", {})[kind] = _loss(artefacts, path)
            except NotInstalled:
                raise
            except PipelineError as error:  # of this file, and no other
                yield claim.holds(False, str(error))
    (artefacts.scratch / _REFERENCE).unlink(missing_ok=True)


def _measure(artefacts: Artefacts) -> Callable[[Path], DivergenceStatistics]:
    """What compares a file with the 16-bit one: llama-perplexity, where there are enough tokens for it.

    It scores the second half of every chunk, and gives no statistics over fewer than a hundred positions. Then all
    positions of the rows are compared directly.
    """
    rows = [ids for ids, _ in artefacts.compared_rows()]
    ids = list(itertools.chain.from_iterable(rows))
    context = min(CHUNK, len(ids))
    whole, adapter = artefacts.merged_reference, artefacts.gguf_adapter
    add_bos = inspect(whole).metadata.get("tokenizer.ggml.add_bos_token")
    if add_bos and artefacts.tokenizer.bos_token_id is not None:
        ids = _chunks_with_bos(ids, artefacts.tokenizer.bos_token_id, context)
    if scored_positions(len(ids), context) < LEAST_POSITIONS:
        return lambda path: compare_files(whole, path, rows, adapter).statistics
    reference, chunks = artefacts.scratch / _REFERENCE, len(ids) // context
    with (
        LlamaModel(whole, context=context) as model,
        progress("logits of the 16-bit file", chunks, "chunks") as update,
    ):
        write_reference(model, ids, reference, context, update)
    threads = cores()

    def by_llama_perplexity(path: Path) -> DivergenceStatistics:
        with progress(f"logits of {path.name}", chunks, "chunks") as update:
            return compare(path, reference, threads, update, adapter=adapter)

    return by_llama_perplexity


def _loss(artefacts: Artefacts, path: Path) -> float:
    """A file's held-out loss, in nats for each trained token."""
    rows = artefacts.compared_rows()
    losses: list[RowLoss] = []
    longest = max(len(ids) for ids, _ in rows)
    with (
        LlamaModel(path, adapter=artefacts.gguf_adapter, context=-(-longest // 256) * 256) as file,
        progress(f"held-out loss of {path.name}", len(rows), "rows") as update,
    ):
        for ids, labels in rows:
            losses.append(row_loss(file.logits(ids), ids, labels))
            update(len(losses))
    return mean_loss(losses)


def _chunks_with_bos(ids: list[int], bos: int, context: int) -> list[int]:
    """Chunks that begin with BOS: llama-perplexity writes it there."""
    parts = [ids[start : start + context - 1] for start in range(0, len(ids), context - 1)]
    return list(itertools.chain.from_iterable([bos, *part] for part in parts if len(part) == context - 1))


def _judged(artefacts: Artefacts, claim: Claim, kind: str, found: DivergenceStatistics) -> Result:
    artefacts.shared.setdefault("divergences", {})[kind] = found.mean
    artefacts.shared.setdefault("quantized", {})[kind] = vars(found)
    bits = inspect(artefacts.quantized[kind]).bits_per_weight
    limit = artefacts.settings.quantized_divergence or _limit(kind, bits)
    few = "" if found.positions >= _ENOUGH else "; few positions, so this is rough"
    return claim.at_most(
        found.mean,
        limit,
        f"mean KL {found.mean:.3g} over {found.positions:,} positions, the same likeliest token at "
        f"{found.same_top:.1%}{few}",
    )


def _limit(kind: str, bits: float) -> float:
    """What a type may lose: by the bits that its name promises."""
    from pipeline.llamacpp.quantizer import quantization_type

    with contextlib.suppress(PipelineError):  # the name says nothing: then the file's own bits
        bits = quantization_type(kind).promised_bits or bits
    return next(limit for least, limit in _LIMITS if bits >= least)

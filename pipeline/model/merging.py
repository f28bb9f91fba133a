"""An adapter merged into a base's weights tensor by tensor, from the files: no model is loaded, so any size fits.

What a tensor becomes is a sum in float32, rounded once. Its bytes are those of PEFT's `merge_and_unload` on a model
that was loaded in float32 and then rounded: the same products and sums in the same order. An adapter of another kind is
refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError, UserError
from pipeline.model.adapter_file import AdapterFile, is_matrix, refuse_half_of_a_pair, renaming
from pipeline.model.nf4 import Kept, Record
from pipeline.model.sixteen_bit_type import sixteen_bit_type
from pipeline.model.targets import OTHER_SENSES
from pipeline.model.weights_file import Weights, torch_type
from pipeline.model.weights_writer import TensorPlan, WeightsWriter
from pipeline.processes import cores

_PIECE = 1 << 18  # numbers that are added at once: they stay in a processor's cache
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_A|lora_B)"
    r"(?P<kind>\.weight|\.bias)?"
)
_TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta")
# Settings of adapters whose sum is another one, or lies in tensors that the files do not have one by one.
_OTHER_SUMS = (
    "target_parameters", "layer_replication", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config", "alora_invocation_tokens", "megatron_config",
)  # fmt: skip
# Beginnings that take something off the base's own weights: the adapter belongs to what is left.
_OTHER_BASES = re.compile(r"pissa|olora|corda|loftq|lora_ga|mica", re.IGNORECASE)


@dataclass(frozen=True)
class Addition:
    """What an adapter adds to one module's weight: scaling x B A.

    Attributes:
        module: its name in the loaded model.
        a, b: the adapter's tensors, (r, in) and (out, r).
        magnitude: DoRA's, (out,), by name; None without it.
        scaling: the factor.
        transposed: the weight is (in, out), as GPT-2's and an embedding's are.
    """

    module: str
    a: str
    b: str
    magnitude: str | None
    scaling: float
    transposed: bool


class MergedWeights:
    """The tensors of a base with an adapter's changes. `merged[name]` is one of them, whole, in float32, not rounded.

    Args:
        base: weights in 16 or 32 bits.
        adapter: of PEFT's LoRA: also rsLoRA, DoRA, biases, saved modules, embeddings and single tokens.
        record: how training had the modules; None where that is not known.
        dequantize: merge into what NF4 keeps of the modules that were in 4 bits.

    Raises:
        UserError: this adapter cannot be merged so.
        PipelineError: the adapter and the base do not belong together, or the adapter changes nothing.
    """

    def __init__(
        self, base: Weights, adapter: AdapterFile, record: Record | None = None, *, dequantize: bool = False
    ) -> None:
        self.base, self.adapter = base, adapter
        _refuse_other_kinds(adapter)
        parts, self._replaced, self._tokens = _sorted(adapter)
        self._renaming = renaming(parts, base)
        transposed = record.transposed if record is not None else frozenset()
        self.additions = {
            name: addition
            for module, found in parts.items()
            for name, addition in [self._addition(module, found, module in transposed)]
        }
        self._biases = {
            self._place(f"{module}.bias", found["lora_B.bias"]): (found["lora_B.bias"], adapter.scaling(module))
            for module, found in parts.items()
            if "lora_B.bias" in found
        }
        heads = [name for plain, name in self._replaced.items() if not self._own(plain)]
        self._replaced = {self._place(plain, name): name for plain, name in self._replaced.items() if self._own(plain)}
        self._tokens = {self._place(f"{module}.weight", name): name for module, name in self._tokens.items()}
        self._refuse_what_is_lacking(set(parts))
        self._refuse_what_is_tied()
        self._refuse_a_pair_that_parted(heads)
        self._kept = Kept(base, record if record is not None and dequantize else Record(), self._renaming)

    @property
    def names(self) -> list[str]:
        """Every tensor of the merged model."""
        return self.base.own

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape: the base's, but for an embedding that was given more rows."""
        return self.adapter.weights.shapes[self._replaced[name]] if name in self._replaced else self.base.shapes[name]

    def type(self, name: str) -> str:
        """The type that a tensor is rounded to: the one that it is stored in; a float32 base becomes bfloat16."""
        stored = self.base.types[name]
        return sixteen_bit_type(self.base).upper() if stored == self.base.main_type == "F32" else stored

    @property
    def vocabulary(self) -> int | None:
        """How many rows the embedding has, where they are not as many as the base's."""
        resized = [
            name for name in self._replaced if _is_embedding(name) and self.shape(name) != self.base.shapes[name]
        ]
        return self.shape(resized[0])[0] if resized else None

    @cached_property
    def change(self) -> float:
        """The norm of all that is added, without forming it: |BA|^2 is the sum over (B'B) x (AA').

        Raises:
            PipelineError: a module's adapter changes nothing, or is not finite.
        """
        total = 0.0
        for addition in self.additions.values():
            a, b = (self.adapter.weights[name].double() for name in (addition.a, addition.b))
            square = addition.scaling**2 * float(((b.T @ b) * (a @ a.T)).sum())
            if not 0 < square < float("inf"):
                raise changes_nothing(addition.module)
            total += square
        return math.sqrt(total)

    def __getitem__(self, name: str) -> Any:
        import torch

        parts = [after.float() for _, _, after in self.pieces(name)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.reshape(self.shape(name))

    def pieces(self, name: str) -> Iterator[tuple[int, Any, Any]]:
        """What a tensor becomes, some rows at a time.

        Yields:
            The first row; what the base has there, in float32, or None where it is not added to; and what is there now,
            not rounded.
        """
        addition = self.additions.get(name)
        if addition is not None:
            yield from self._added(name, addition)
        elif name in self._kept:
            yield 0, None, self._kept[name]
        elif name in self._replaced:
            yield from ((row, None, piece) for row, piece in self.adapter.weights.pieces(self._replaced[name]))
        elif name in self._biases:
            bias, scaling = self._biases[name]
            yield 0, None, self.base[name].float() + self.adapter.weights[bias].float() * scaling
        elif name in self._tokens:
            rows = self.base[name].float()
            rows[self._trained_tokens(name)] = self.adapter.weights[self._tokens[name]].float()
            yield 0, None, rows
        else:
            yield from ((row, None, piece) for row, piece in self.base.pieces(name))

    def _added(self, name: str, addition: Addition) -> Iterator[tuple[int, Any, Any]]:
        adapter = self.adapter.weights
        a, b = adapter[addition.a].float(), adapter[addition.b].float()
        magnitude = None if addition.magnitude is None else adapter[addition.magnitude].float().reshape(-1)
        if addition.transposed or name in self._kept:  # blocks of 4 bits run across rows
            before = self._kept[name] if name in self._kept else self.base[name].float()
            yield 0, before, _sum(before, a, b, magnitude, addition)
            return
        count, width = self.base.shapes[name]
        step = max(1, _PIECE // width)
        for row in range(0, count, step):
            stop = min(count, row + step)
            before = self.base.rows(name, row, stop).float()
            part = None if magnitude is None else magnitude[row:stop]
            yield row, before, _sum(before, a, b[row:stop], part, addition)

    def _addition(self, module: str, found: dict[str, str], turned: bool) -> tuple[str, Addition]:
        embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        for part in (first, second):
            if part not in found:
                raise PipelineError(f"partial merge: the adapter lacks {module}.{part}")
        a, b = found[first], found[second]
        name = self._place(f"{module}.weight", a)
        shapes = self.adapter.weights.shapes
        plain = (shapes[b][0], shapes[a][1])
        if self.base.shapes[name] not in (plain, plain[::-1]) or shapes[a][0] != shapes[b][1]:
            raise PipelineError(
                f"partial merge: {module} is {self.base.shapes[name]} in the base, and its adapter {plain}; was it "
                "trained on another base?"
            )
        square = plain[0] == plain[1]
        flagged = turned or bool(self.adapter.settings.get("fan_in_fan_out"))
        transposed = embedding or (flagged if square else self.base.shapes[name] != plain)
        magnitude = found.get("lora_magnitude_vector.weight") or found.get("lora_magnitude_vector")
        if magnitude is None and self.adapter.settings.get("use_dora"):
            raise PipelineError(f"partial merge: the adapter lacks {module}.lora_magnitude_vector")
        return name, Addition(module, a, b, magnitude, self.adapter.scaling(module), transposed)

    def _own(self, plain: str) -> bool:
        """Not a tied head that was saved beside its embedding: trained as one with it, or only given more rows."""
        one = self._only_resized or self.adapter.settings.get("ensure_weight_tying")
        return not (self.base.tied and plain.endswith("lm_head.weight") and one)

    @property
    def _only_resized(self) -> bool:
        return not self.adapter.settings.get("modules_to_save")

    def _place(self, plain: str, of: str) -> str:
        """The base's tensor of a name in the loaded model."""
        name = self._renaming.to_file(plain)
        if name not in self.base.shapes:
            raise PipelineError(
                f"partial merge: the adapter has, and the base has no place for, {of}; was it trained on another base?"
            )
        return name

    def _refuse_what_is_lacking(self, adapted: set[str]) -> None:
        matrices = [
            self._renaming.to_model(name).removesuffix(".weight")
            for name in self.base.own
            if is_matrix(self.base, name)
        ]
        saved = {name.removesuffix(".weight") for name in self.adapter.plain}
        senses = any(OTHER_SENSES.search(module) for module in adapted)  # a text model may be loaded of more than text
        for module in self.adapter.meant(matrices):
            if module not in adapted and module not in saved and (senses or not OTHER_SENSES.search(module)):
                raise PipelineError(f"partial merge: the adapter lacks {module}, which its target_modules mean")

    def _refuse_what_is_tied(self) -> None:
        """The head that is the embedding was trained with it, or neither was."""
        if not self.base.tied:
            return
        replaced = {} if self._only_resized else self._replaced
        changed = {**{name: addition.a for name, addition in self.additions.items()}, **replaced}
        refuse_half_of_a_pair(
            self.adapter.folder, self.adapter.settings, [of for name, of in changed.items() if _is_embedding(name)]
        )

    def _refuse_a_pair_that_parted(self, heads: Iterable[str]) -> None:
        """What was trained as one is one: a head that is left out of the merge is the embedding that is not."""
        for head in heads if self.base.tied and not self._only_resized else ():
            for name, of in self._replaced.items():
                if _is_embedding(name) and not self.adapter.weights[of].equal(self.adapter.weights[head]):
                    raise PipelineError(
                        f"{self.adapter.folder}: {head} and {of} differ, and the base has one tensor for both (tied)"
                    )

    def _trained_tokens(self, name: str) -> list[int]:
        given = self.adapter.settings.get("trainable_token_indices") or []
        if isinstance(given, dict):
            module = self._renaming.to_model(name).removesuffix(".weight")
            given = next((rows for key, rows in given.items() if module == key or module.endswith(f".{key}")), [])
        return [int(row) for row in given]


def changes_nothing(module: str) -> PipelineError:
    """The error for a module that the training did not reach."""
    return PipelineError(
        f"{module}: its adapter changes nothing, or is not finite; the training did not reach this module. Train again "
        "(`pipeline train --force`), or leave the module out of lora.target_modules"
    )


def _sum(before: Any, a: Any, b: Any, magnitude: Any, addition: Addition) -> Any:
    """The base's weight plus scaling x B A; with DoRA its columns at the trained lengths.

    DoRA (S. Liu et al., 2024, equation 5): magnitude x (W + scaling B A) / |W + scaling B A|, row by row of the output.
    """
    import torch

    product = b @ a
    delta = product.T if addition.transposed else product
    if addition.scaling != 1:
        delta.mul_(addition.scaling)
    if magnitude is None:
        return delta.add_(before)
    summed = before.T + delta.T if addition.transposed else before + delta
    factor = (magnitude / torch.linalg.norm(summed, dim=1)).view(-1, 1)
    return (factor.T if addition.transposed else factor) * (before + delta)


def _sorted(adapter: AdapterFile) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, str]]:
    """An adapter's tensors: parts of additions by module, whole tensors, and rows of single tokens by module."""
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    tokens: dict[str, str] = {}
    for plain, name in adapter.plain.items():
        if match := _PART.fullmatch(plain):
            parts.setdefault(match["module"], {})[match["part"] + (match["kind"] or "")] = name
        elif match := _TOKENS.fullmatch(plain):
            tokens[match["module"]] = name
        else:
            whole[plain] = name
    return parts, whole, tokens


def _is_embedding(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "embed_out.weight"))


def _refuse_other_kinds(adapter: AdapterFile) -> None:
    settings = adapter.settings
    if settings.get("peft_type") != "LORA":
        raise _cannot(adapter, f"it is no LoRA but {settings.get('peft_type')}")
    for key in _OTHER_SUMS:
        if settings.get(key):
            raise _cannot(adapter, f"its configuration has {key}")
    if _OTHER_BASES.match(str(settings.get("init_lora_weights"))):
        raise _cannot(adapter, f'it began as "{settings["init_lora_weights"]}", which changes the base\'s own weights')


def _cannot(adapter: AdapterFile, why: str) -> UserError:
    return UserError(
        f"{adapter.folder}: this adapter is not merged tensor by tensor: {why}. `--set merge.way=peft` has PEFT merge "
        "it, in memory for the whole model"
    )


@dataclass
class Sums:
    """Of the merged modules: the squares of what the base had, and of what rounding took off."""

    base: float = 0.0
    rounding: float = 0.0


def write_merged(merged: MergedWeights, folder: Path, update: Callable[[float], None]) -> Sums:
    """Write the merged model's tensors, in files of the base's names.

    Args:
        merged: the tensors.
        folder: where.
        update: called with the number of tensors that are done.

    Raises:
        PipelineError: a number is not finite.
    """
    import torch

    plans = {
        name: TensorPlan(merged.base.file_of[name].name, merged.type(name), merged.shape(name)) for name in merged.names
    }
    sums = Sums()
    threads = torch.get_num_threads()
    with WeightsWriter(folder, plans) as writer:
        # One thread for each of the processor's, each computing alone.
        pool = ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,))
        try:
            results = pool.map(lambda name: _write_one(merged, name, writer), sorted(plans, key=merged.base.place))
            for done, (base, rounding) in enumerate(results, 1):
                sums.base += base
                sums.rounding += rounding
                update(done)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
    return sums


def _write_one(merged: MergedWeights, name: str, writer: WeightsWriter) -> tuple[float, float]:
    import torch

    base = rounding = 0.0
    stored = torch_type(merged.type(name))
    for row, before, after in merged.pieces(name):
        rounded = after.to(stored)
        writer.write(name, row, rounded)
        if before is not None:
            base += float(torch.linalg.vector_norm(before)) ** 2
            size = float(torch.linalg.vector_norm(after.sub_(rounded.float())))  # of what rounding took off
            rounding += size**2
        else:
            size = float(torch.linalg.vector_norm(rounded, dtype=torch.float32)) if stored.is_floating_point else 0.0
        if not math.isfinite(size) and not torch.isfinite(rounded).all():
            raise PipelineError(f"{name}: not finite as {stored}; the base was stored in a type of smaller range")
    return base, rounding

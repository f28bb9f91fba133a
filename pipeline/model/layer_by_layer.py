"""Logits of a model that is never loaded whole: layer after layer, each for all rows, in float32 on the CPU.

Every batch of rows is a forward pass in a thread of its own. A pass stops in front of each part that has weights: when
all have come there, the part's weights are read, the passes go through it one after the other, and the weights are
dropped. So a model of any size takes the memory of its largest part, and every weight is read once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.model.adapter_file import renaming, stored_as
from pipeline.model.predict import batches, padded
from pipeline.model.targets import without_weights
from pipeline.model.weights_file import Weights

Source = Callable[[str], Any]  # a tensor of the model by the name that it has in the files


class Layers:
    """A model without weights, and the parts that are given some one after the other.

    Attributes:
        model: of transformers, on torch's meta device.
        unused: tensors of the files that it has no place for.
        misshapen: those that have another shape in it.

    Args:
        weights: the model's files.
        trust_remote_code: run the folder's own Python code.

    Raises:
        UserError: transformers does not know the architecture.
    """

    def __init__(self, weights: Weights, *, trust_remote_code: bool = False) -> None:
        from accelerate import init_empty_weights

        place = init_empty_weights(include_buffers=False)
        self.model = without_weights(weights.folder, trust_remote_code=trust_remote_code, place=place).eval()
        self.model.tie_weights()
        self._parts = [(name, part) for name, part in _parts(self.model)]
        own, tensors = set(weights.own), list(_tensors(self.model))
        names = renaming((name.removesuffix(".weight") for name, value in tensors if value.dim() == 2), weights)
        found = ((value, stored_as(name, weights, names)) for name, value in tensors)
        stored = {id(value): parts for value, parts in found if parts and own.issuperset(parts)}
        self._stored = {name: stored.get(id(value), ()) for name, value in tensors}
        self.unused = sorted(own.difference(*self._stored.values()))
        self.misshapen = [
            name
            for name, value in tensors
            if (parts := [weights.shapes[of] for of in self._stored[name]])
            and (parts != [tuple(value.shape)] if len(parts) == 1 else sum(map(math.prod, parts)) != value.numel())
        ]

    @property
    def lacking(self) -> list[str]:
        """What the model wants and the files do not have by that name: then it has to be loaded whole."""
        return [name for name, stored in self._stored.items() if not stored]

    def predict(
        self, source: Source, rows: Sequence[Sequence[int]], update: Callable[[float], None] = lambda done: None
    ) -> Iterator[Any]:
        """Logits of rows, in their order: for each a float32 array [len(row), vocabulary].

        Args:
            source: reads the model's tensors.
            rows: token ids.
            update: called with the share of the parts that are done.
        """
        passes = [_Pass(self.model, batch) for batch in batches(rows)]
        hooks = [part.register_forward_pre_hook(_stop_at(number)) for number, (_, part) in enumerate(self._parts)]
        done = 0
        try:
            for one in passes:
                one.go()
            while passes:
                number = passes[0].stopped_at
                name, part = self._parts[number]
                self._load(name, part, source)
                for one in list(passes):
                    if one.stopped_at == number:
                        one.go()
                        if one.logits is not None:
                            passes.remove(one)
                            yield from one.rows()
                self._drop(part)
                done += 1
                update(min(1.0, done / len(self._parts)))
        finally:
            for one in passes:
                one.cancel()
            for hook in hooks:
                hook.remove()

    def _load(self, prefix: str, part: Any, source: Source) -> None:
        import torch

        for name, empty in _tensors(part):
            holder, key = _holder(part, name)
            parts = self._stored[f"{prefix}.{name}"]
            value = source(parts[0]).float() if len(parts) == 1 else _joined(parts, source, empty.shape)
            if key in holder._buffers:
                holder._buffers[key] = value
            else:
                holder._parameters[key] = torch.nn.Parameter(value, requires_grad=False)

    def _drop(self, part: Any) -> None:
        import torch

        for name, value in list(_tensors(part)):
            holder, key = _holder(part, name)
            empty = torch.empty(value.shape, dtype=torch.float32, device="meta")
            if key in holder._buffers:
                holder._buffers[key] = empty
            else:
                holder._parameters[key] = torch.nn.Parameter(empty, requires_grad=False)


def _parts(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The layers of a model, and what beside them has weights of its own."""
    from torch.nn import ModuleList

    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if isinstance(child, ModuleList):
            yield from ((f"{full}.{number}", layer) for number, layer in enumerate(child))
        elif any(True for _ in child.parameters(recurse=False)) or not any(True for _ in child.children()):
            if any(True for _ in _tensors(child)):
                yield full, child
        else:
            yield from _parts(child, f"{full}.")


def _tensors(module: Any) -> Iterator[tuple[str, Any]]:
    """Parameters, a tied one under each of its names, and those buffers that files hold."""
    yield from module.named_parameters(remove_duplicate=False)
    for prefix, child in module.named_modules():
        for name, value in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), value


def _joined(parts: Sequence[str], source: Source, shape: Sequence[int]) -> Any:
    """The tensors of the experts as the one that the model has; each is read when its place is filled."""
    import torch

    joined = torch.empty(shape)
    numbers, at = joined.view(-1), 0
    for part in parts:
        value = source(part).reshape(-1)
        numbers[at : at + len(value)] = value
        at += len(value)
    return joined


def _holder(part: Any, name: str) -> tuple[Any, str]:
    inner, _, key = name.rpartition(".")
    return (part.get_submodule(inner) if inner else part), key


_own = threading.local()  # the pass of a thread


def _stop_at(number: int) -> Callable[[Any, Any], None]:
    def hook(module: Any, given: Any) -> None:
        _own.current.stop(number)

    return hook


class _Cancelled(BaseException):
    """Ends a pass whose result nobody wants any more."""


class _Pass:
    """One batch on its way through the model; it moves only between `go` and its next stop."""

    def __init__(self, model: Any, batch: Sequence[Sequence[int]]) -> None:
        self._model, self._batch = model, batch
        self._may, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._cancelled = False
        self._error: BaseException | None = None
        self.stopped_at = -1
        self.logits: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go(self) -> None:
        """Let it go on to its next stop, or to its end."""
        self._may.release()
        self._waits.acquire()
        if self._error is not None:
            raise self._error

    def stop(self, number: int) -> None:
        """Called by the pass itself in front of a part."""
        self.stopped_at = number
        self._waits.release()
        self._may.acquire()
        if self._cancelled:
            raise _Cancelled

    def cancel(self) -> None:
        """End it where it is."""
        self._cancelled = True
        self._may.release()
        self._thread.join()

    def rows(self) -> Iterator[Any]:
        """The logits of its rows."""
        logits, self.logits = self.logits, None
        for place, row in enumerate(self._batch):
            yield logits[place, : len(row)]

    def _run(self) -> None:
        import torch

        _own.current = self
        self._may.acquire()
        try:
            if not self._cancelled:
                with torch.inference_mode():
                    ids = padded(self._batch)
                    self.logits = self._model(input_ids=ids, use_cache=False).logits.float().numpy()
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        self._waits.release()

"""Work on rows in processes of their own, while this one reads them and writes what comes of them."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Generic, TypeVar

from pipeline.errors import PipelineError
from pipeline.processes import cores, end_with_parent

_MOST = 8  # processes: this one reads no faster than so many encode
_AHEAD = 8  # batches done here while a process is at the one before them
_OBJECTS = 100_000  # that are made before the garbage collector looks through them: more than a batch has, not 700

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class EncoderPool(Generic[Batch, Result]):
    """Does the same with one batch after the other.

    Args:
        work: what is done with a batch; it is not sent to the processes, which are forked with it.
        workers: how many processes; None for what the machine has to spare. With none the work is done here.
    """

    def __init__(self, work: Callable[[Batch], Result], workers: int | None = None) -> None:
        self._work = work
        self._workers = min(cores() - 1, _MOST) if workers is None else workers
        self._processes: ProcessPoolExecutor | None = None
        self._running: list[Future[Result]] = []

    def map(self, batches: Iterable[Batch]) -> Iterator[Result]:
        """The results, in the order of the batches, some of which are taken ahead.

        Raises:
            PipelineError: a process was killed.
        """
        begun: deque[Future[Result]] = deque()
        try:
            for batch in batches:
                begun.append(self._begin(batch))
                while begun and (begun[0].done() or len(begun) > 2 * self._workers + _AHEAD):
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        except BrokenProcessPool:
            raise PipelineError(
                "a process that tokenizes rows was killed; most likely the memory ran out: close other programs, and "
                "give the same command again"
            ) from None

    def _begin(self, batch: Batch) -> Future[Result]:
        """Have a batch worked on: by a process, or here where every process has its next one already."""
        self._running = [future for future in self._running if not future.done()]
        if len(self._running) >= 2 * self._workers:
            done: Future[Result] = Future()
            done.set_result(self._work(batch))
            return done
        if self._processes is None:
            self._processes = ProcessPoolExecutor(
                self._workers,
                multiprocessing.get_context("fork"),
                initializer=_begin,
                initargs=(self._work, os.getpid()),
            )
        self._running.append(self._processes.submit(_do, batch))
        return self._running[-1]

    def __enter__(self) -> EncoderPool[Batch, Result]:
        self._threshold = gc.get_threshold()
        gc.set_threshold(_OBJECTS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.set_threshold(*self._threshold)
        if self._processes is not None:
            self._processes.shutdown(cancel_futures=True)


_own: Callable[[Any], Any] | None = None  # in a process of the pool


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    global _own
    end_with_parent(parent)
    gc.freeze()  # what it was forked with is no garbage, and looking through it would copy its pages
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads were not forked
    _own = work


def _do(batch: Any) -> Any:
    assert _own is not None
    return _own(batch)

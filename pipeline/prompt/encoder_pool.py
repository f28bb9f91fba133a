"""Encoding in processes of their own, while this one reads rows and writes sequences."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from pipeline.data.formats import Conversation
from pipeline.errors import PipelineError
from pipeline.processes import cores, end_with_parent
from pipeline.prompt.sequences import Encoder, Outcome

_MOST = 8  # processes: this one reads no faster than so many encode


class EncoderPool:
    """Makes sequences of rows, as its encoder does.

    Args:
        encoder: it is not sent to the processes, which are forked with it.
        workers: how many processes; None for what the machine has to spare. With none the rows are encoded here.
    """

    def __init__(self, encoder: Encoder, workers: int | None = None) -> None:
        self.encoder = encoder
        self._workers = min(cores() - 1, _MOST) if workers is None else workers
        self._processes: ProcessPoolExecutor | None = None
        self._running: list[Future[list[Outcome]]] = []

    def begin(self, rows: Sequence[Conversation]) -> Future[list[Outcome]]:
        """Have rows encoded: by a process, or here where every process has its next rows already.

        Raises:
            PipelineError: a process was killed.
        """
        self._running = [future for future in self._running if not future.done()]
        if len(self._running) >= 2 * self._workers:
            done: Future[list[Outcome]] = Future()
            done.set_result(self.encoder.encode(rows))
            return done
        if self._processes is None:
            self._processes = ProcessPoolExecutor(
                self._workers,
                multiprocessing.get_context("fork"),
                initializer=_begin,
                initargs=(self.encoder, os.getpid()),
            )
        try:
            self._running.append(self._processes.submit(_encode, rows))
        except BrokenProcessPool:
            raise _killed() from None
        return self._running[-1]

    @staticmethod
    def outcomes(begun: Future[list[Outcome]]) -> list[Outcome]:
        """The outcomes of rows, in their order.

        Raises:
            PipelineError: the process that encoded them was killed.
        """
        try:
            return begun.result()
        except BrokenProcessPool:
            raise _killed() from None

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._processes is not None:
            self._processes.shutdown(cancel_futures=True)


def _killed() -> PipelineError:
    return PipelineError(
        "a process that tokenizes rows was killed; most likely the memory ran out: close other programs, and give the "
        "same command again"
    )


_own: Encoder | None = None  # in a process of the pool


def _begin(encoder: Encoder, parent: int) -> None:
    global _own
    end_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads were not forked
    _own = encoder


def _encode(rows: Sequence[Conversation]) -> list[Outcome]:
    assert _own is not None
    return _own.encode(rows)

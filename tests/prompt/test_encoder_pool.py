"""Encoding in processes of their own: the same outcomes and the same files, whoever encodes."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from support import small_models

from pipeline.data.formats import Conversation
from pipeline.errors import PipelineError
from pipeline.processes import cores
from pipeline.prompt.encoder_pool import EncoderPool
from pipeline.prompt.sequences import Encoder
from pipeline.prompt.tokenizer import Beyond, saved_tokenizer
from pipeline.stages import data


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(saved_tokenizer(small_models.base_folder()), Beyond({}, 0, 0), max_length=64)


def row(number: int, answer: str) -> Conversation:
    asked = {"role": "user", "content": f"Say {number}"}
    return Conversation([asked, {"role": "assistant", "content": answer}], f"rows.jsonl:{number}")


def test_outcomes_are_the_same_and_in_order(encoder: Encoder) -> None:
    rows = [row(number, f"It is {number}.") for number in range(40)]
    rows[7] = row(7, "It ends <|im_end|> here")
    rows[11] = row(11, "long " * 100)
    expected = encoder.encode(rows)
    with EncoderPool(encoder.encode, workers=2) as pool:
        found = [one for outcomes in pool.map(rows[start : start + 8] for start in range(0, 40, 8)) for one in outcomes]
    assert [(one.row, one.kept, one.notes, str(one.error)) for one in found] == [
        (one.row, one.kept, one.notes, str(one.error)) for one in expected
    ]
    for number, kind in ((7, "the control token <|im_end|>"), (11, "too long")):
        error = found[number].error
        assert error is not None
        assert getattr(error, "kind", None) == kind


def test_a_process_that_is_killed_is_one_message(encoder: Encoder) -> None:
    with EncoderPool(encoder.encode, workers=1) as pool:
        list(pool.map([[row(1, "One.")]]))
        (process,) = multiprocessing.active_children()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(PipelineError, match="a process that tokenizes rows was killed"):
            for _ in range(100):
                list(pool.map([[row(2, "Two.")]]))


def test_the_data_stage_writes_the_same_on_one_core_and_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for number in range(1300):
            said = f"It is {number}." if number % 100 else "It ends <|im_end|> here"
            file.write(json.dumps({"prompt": f"Say {number}", "completion": said}) + "\n")

    def files(run: Path) -> dict[str, bytes]:
        settings = {"train": str(rows), "validation_fraction": 0.3, "control_tokens": "keep"}
        data.main(small_models.make_task(run, "data", data=settings, train={"max_length": 64}))
        return {path.name: path.read_bytes() for path in (run / "data").iterdir()}

    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("one core: encoding in other processes was not tested")
    found = []
    for threads in (2, 1):  # the program's own, whatever the tests' processes are told
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        assert cores() == threads
        found.append(files(tmp_path / str(threads)))
    many, one = found
    assert len(many) >= 6
    assert one == many

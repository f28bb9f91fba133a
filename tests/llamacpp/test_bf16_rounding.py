"""Rounding to bfloat16 in the converter's process: the bits are those of gguf-py and of the script by itself."""

import subprocess
from pathlib import Path

import numpy as np
from gguf.quants import BF16
from support.adapters import small_base

from pipeline.llamacpp.bf16_rounding import rounding
from pipeline.llamacpp.converter import SCRIPTS, command, convert
from pipeline.llamacpp.gguf_file import inspect


def test_the_bits_are_those_of_gguf_py() -> None:
    """Of every sign, exponent and high part of a mantissa, with what is cut off at, below and above the half."""
    high = np.arange(2**16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    numbers = (high[:, None] | low).view(np.float32)
    not_a_number = np.isnan(numbers).any(1)
    ours = rounding(BF16.quantize_blocks)
    for some in (numbers[~not_a_number], numbers[not_a_number], numbers):
        assert np.array_equal(ours(BF16, some), BF16.quantize_blocks(some))
    assert not_a_number.sum() == 2 * 2**7  # one of them is an infinity, and that with nothing cut off


def test_it_is_what_scripts_round_with(tmp_path: Path) -> None:
    script, lines = tmp_path / "script.py", list[str]()
    script.write_text("from gguf.quants import BF16; print(BF16.quantize_blocks.__module__)")
    assert SCRIPTS.run([script], lines.append) == 0
    assert lines == [rounding.__module__]


def test_the_file_is_that_of_the_script_by_itself(tmp_path: Path) -> None:
    by_itself, ours = tmp_path / "by-itself.gguf", tmp_path / "ours.gguf"
    subprocess.run(command(small_base(converts=True), by_itself, "bf16"), check=True, capture_output=True)
    convert(command(small_base(converts=True), ours, "bf16"), tmp_path)
    assert any(tensor.storage.name == "bf16" for tensor in inspect(ours).tensors)
    assert ours.read_bytes() == by_itself.read_bytes()

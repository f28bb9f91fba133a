"""How figures are written for a person."""

from typing import Any

import pytest

from pipeline.figures import duration, main_figures, peak_memory, size, written
from pipeline.stages import evaluate, verify


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("rows", 1520, "1,520"),
        ("loss", 0.123456, "0.1235"),
        ("divergence", 1.5e-06, "1.5e-06"),
        ("tokens_per_second", 12345.6, "12,346"),
        ("loss", float("nan"), "nan"),
        ("loss", float("inf"), "inf"),
        ("load_in_4bit", True, "yes"),
        ("bytes", 145_000_000, "145.0 MB"),
        ("peak_gpu_bytes", 9_800_000_000, "9.8 GB"),
        ("names", ["a", "b"], "a, b"),
        ("interval", [0.5, 2000.0], "0.5, 2,000"),
        ("types", {"F32": 61, "Q4_K": 150}, "F32: 61, Q4_K: 150"),
        ("first_broken", None, ""),
        ("device", "cpu", "cpu"),
    ],
)
def test_a_value(name: str, value: Any, text: str) -> None:
    assert written(name, value) == text


def test_a_stage_s_main_figures_and_none_that_is_not_there() -> None:
    figures = {"verdict": "pass", "pass": 40, "fail": 0, "not_run": 1, "first_broken": None, "divergence": 1e-6}
    assert main_figures(verify.STAGE.figures, figures) == "verdict pass, pass 40, fail 0, not run 1"


def test_every_rung_has_its_share_under_its_own_name() -> None:
    rungs = ("base", "adapter", "adapter-16bit", "merged", "gguf-16bit", "q4_k_m", "q8_0", "ollama")
    shown = main_figures(evaluate.STAGE.figures, dict.fromkeys(rungs, 0.5))
    assert shown == ", ".join(f"{rung} 0.5" for rung in rungs)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.4, "59.4 s"),
        (59.96, "1 min 0 s"),
        (500, "8 min 20 s"),
        (3599.4, "59 min 59 s"),
        (3599.9, "1 h 0 min"),
        (18_200, "5 h 3 min"),
        (93_600, "26 h 0 min"),
    ],
)
def test_a_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes() -> None:
    assert [size(count) for count in (0, 999, 1500, 2_100_000_000, 1_400_000_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "2.1 GB",
        "1.4 TB",
    ]


def test_a_gpu_s_memory_stands_beside_the_process_s() -> None:
    record: dict[str, Any] = {"peak_memory_bytes": 2_100_000_000, "figures": {}}
    assert peak_memory(record) == "2.1 GB"
    assert peak_memory(record | {"figures": {"peak_gpu_bytes": 9_800_000_000}}) == "2.1 GB, GPU 9.8 GB"

"""The benchmarks print what they measured, and ratios to a baseline of the same run. No time is asserted."""

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from benchmarks import families, measure, random_model
from benchmarks.program import project

ROOT = Path(__file__).parent.parent
ROW = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
CELL = r"[\d,.]+"
RATIO = rf"{CELL} \(\d+\.\d\dx\)"
HEAD = "| | seconds | CPU seconds | peak MB | against |\n|---|---|---|---|---|\n"
BASELINE = rf"\| python -c 'import click' \| {CELL} \| {CELL} \| {CELL} \|  \|\n"


def printed(*arguments: str | Path) -> str:
    """What a benchmark prints."""
    command = [sys.executable, "-m", *(str(argument) for argument in arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def row(name: str) -> str:
    return rf"\| {name} \| {RATIO} \| {RATIO} \| {RATIO} \| python -c 'import click' \|\n"


def test_start(tmp_path: Path) -> None:
    config = project(tmp_path, "smollm2-135m-instruct", [ROW])
    said = printed("benchmarks.start", config, "--count", "1")
    assert re.fullmatch(re.escape(HEAD) + BASELINE + row("pipeline --help") + row("pipeline config"), said), said


def test_idle(tmp_path: Path) -> None:
    config = project(tmp_path, "smollm2-135m-instruct", [ROW] * 4)
    said = printed("benchmarks.idle", config, "--command", "data", "--count", "2")
    assert re.fullmatch(re.escape(HEAD) + BASELINE + row("pipeline data"), said), said
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text("utf-8").splitlines()]
    assert [event["kind"] for event in events if event["stage"] == "data"].count("start") == 1


@pytest.mark.parametrize("name", ["data", "export", "idle", "random_model", "start", "train"])
def test_each_explains_itself(name: str) -> None:
    assert "Usage: python -m benchmarks." in printed(f"benchmarks.{name}", "--help")


def test_a_median_of_each_column_and_what_steps_cost_together() -> None:
    turns = iter([{"seconds": 3.0, "peak MB": 1.0}, {"seconds": 1.0, "peak MB": 9.0}, {"seconds": 2.0, "peak MB": 2.0}])
    measured = measure.medians(3, lambda: {"a": next(turns)}, lambda: {"b": {"seconds": 3.0, "peak MB": 1000.0}})
    assert measured == {"a": {"seconds": 2.0, "peak MB": 2.0}, "b": {"seconds": 3.0, "peak MB": 1000.0}}
    assert measure.one_after_the_other([*measured.values()]) == {"seconds": 5.0, "peak MB": 1000.0}
    assert measure.table(measured, {"b": "a"}).splitlines()[2:] == [
        "| a | 2 | 2 |  |",
        "| b | 3 (1.50x) | 1,000 (500.00x) | a |",
    ]


def test_a_child_that_fails_ends_the_measurement() -> None:
    with pytest.raises(SystemExit, match=r"exit status 3\nno such thing"):
        measure.child(sys.executable, "-c", "print('no such thing'); raise SystemExit(3)")


def test_a_child_s_memory_is_that_of_the_largest_process_below_it() -> None:
    program = "bytearray(200_000_000)"
    below = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}], check=True)"
    # A process begins with its parent's peak, and this one may be large: the measuring one is small, as in a benchmark.
    child = f"measure.child(sys.executable, '-c', {below!r})"
    measured = f"import sys; from benchmarks import measure; print({child}[measure.PEAK])"
    answer = subprocess.run([sys.executable, "-c", measured], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 200 < float(answer.stdout) < 400


@pytest.mark.parametrize("parameters", [2e8, 1.3e9, 8e9, 7e10])
@pytest.mark.parametrize("words", [49_152, 128_256])
def test_a_random_model_has_the_size_that_was_asked_for(parameters: float, words: int) -> None:
    hidden, layers = random_model.shape(parameters, words)
    count = words * hidden + layers * (random_model.LAYER * hidden**2 + 2 * hidden) + hidden
    assert hidden % 256 == 0
    assert abs(count / parameters - 1) < 0.25


def test_a_random_model_smaller_than_its_embeddings_is_refused() -> None:
    with pytest.raises(click.UsageError, match="the embeddings of 128256 words alone are more"):
        random_model.shape(1e7, 128_256)


def test_a_family_s_row_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    """The page says of every family what was seen last, or that nothing was."""
    file = tmp_path / "families.md"
    for said in ("preflight: this base cannot go the whole way", ""):
        found = {"failed": [], "said": said, "checks": {"pass": 70}, "way": "go"}
        file.write_text(families.page(families.read_page(file) | {"Falcon": families.row("Falcon", found)}))
        (row,) = re.findall(r"^\| Falcon .*$", file.read_text(), re.MULTILINE)
        assert re.fullmatch(rf"\| Falcon \| falcon \| go \| 70 \| {said} \| \d{{4}}-\d\d-\d\d \|", row)
    rows = families.read_page(file)
    assert list(rows) == list(families.FAMILIES)
    assert rows["GPT-2"] == "| GPT-2 | gpt2 | | | not run | |"
    assert list(families.read_page(families.PAGE)) == list(families.FAMILIES)

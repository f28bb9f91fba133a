"""The charts of a run: well-formed SVG that needs nothing else, the same bytes for the same figures, nothing hidden."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline import plots

SVG = "{http://www.w3.org/2000/svg}"
TRAINED = [{"step": step, "loss": 3 / step} for step in range(1, 61)]
VALIDATED = [{"step": step, "eval_loss": 2.0} for step in (0, 30, 60)]
RUNGS = ("base", "adapter", "adapter-16bit", "merged", "gguf-16bit", "q4_k_m", "ollama")


def texts(path: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(path).iter(f"{SVG}text")]


def drawn(path: Path, colour: str) -> list[str]:
    """What is drawn in a colour: lines, markers, bars."""
    return [e.tag.removeprefix(SVG) for e in ElementTree.parse(path).iter() if colour in e.get("style", "")]


def test_the_loss_curve_names_what_it_shows(tmp_path: Path) -> None:
    plots.loss_curve(TRAINED + VALIDATED, tmp_path / "loss.svg")
    assert {"training, each step", "training, smoothed", "validation", "step"} <= set(texts(tmp_path / "loss.svg"))
    plots.loss_curve(TRAINED[:20], tmp_path / "short.svg")
    assert not {"training, smoothed", "validation"} & set(texts(tmp_path / "short.svg"))


@pytest.mark.parametrize("steps", [1, 2, 20, 21])
def test_a_training_of_few_steps_can_be_seen(tmp_path: Path, steps: int) -> None:
    """A line through one point has no length: only a marker shows it."""
    path = tmp_path / "loss.svg"
    plots.loss_curve(TRAINED[:steps], path)
    legend = 1 if steps <= 20 else 0  # a marker there too
    assert drawn(path, "#9db8d9").count("use") == (steps + legend if steps <= 20 else 0)


def test_the_ladder_names_every_rung_and_draws_each_divergence(tmp_path: Path) -> None:
    path = tmp_path / "ladder.svg"
    answers = dict.fromkeys(RUNGS, (0.5, 0.4, 0.6))
    plots.ladder(answers, {"gguf-16bit": 1e-6, "q4_k_m": 0.02, "merged": 0.0}, path)
    assert [text for text in texts(path) if text in RUNGS] == list(RUNGS)
    assert len(drawn(path, "opacity: 0.55")) == 2
    plots.ladder(answers, {}, tmp_path / "plain.svg")
    assert "mean KL (nats per token)" in texts(path)
    assert "mean KL (nats per token)" not in texts(tmp_path / "plain.svg")


def test_a_name_is_a_text_and_no_formula_or_markup(tmp_path: Path) -> None:
    names = ["$\\frac{", "a_b$x^2$", "<script>&amp;", '"\u202e']
    plots.ladder(dict.fromkeys(names, (1.0, 0.9, 1.0)), {}, tmp_path / "ladder.svg")
    assert [text for text in texts(tmp_path / "ladder.svg") if text in names] == names


def test_names_of_many_rungs_are_slanted(tmp_path: Path) -> None:
    def angles(count: int) -> set[int]:
        path = tmp_path / f"{count}.svg"
        plots.ladder({f"rung-{number}": (0.5, 0.4, 0.6) for number in range(count)}, {}, path)
        labels = [e for e in ElementTree.parse(path).iter(f"{SVG}text") if (e.text or "").startswith("rung-")]
        assert len(labels) == count
        found = [re.search(r"rotate\((-?\d+)", label.get("transform", "")) for label in labels]
        return {int(match[1]) if match else 0 for match in found}

    assert angles(3) == {0}
    assert angles(9) == {-25}


def test_the_same_figures_give_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("one.svg", "two.svg"):
        plots.loss_curve(TRAINED + VALIDATED, tmp_path / name)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    assert not re.search(rb'(href|src)="(?!#)', written[0])

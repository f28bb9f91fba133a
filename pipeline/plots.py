"""The pictures of a run as SVG text: small, sharp, and the same bytes for the same figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def loss_curve(history: list[dict[str, float]], path: Path) -> None:
    """Draw training and validation loss over the steps.

    Args:
        history: rows with "step" and "loss" (nats per trained token) or "eval_loss".
        path: the SVG file to write.
    """
    figure, axes = _figure()
    train = [(row["step"], row["loss"]) for row in history if "loss" in row]
    validation = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    marker = "." if len(train) <= 20 else ""  # a line through one point is nothing to see
    axes.plot(*zip(*train, strict=True), color="#9db8d9", linewidth=1, marker=marker, label="training, each step")
    if len(train) > 20:
        axes.plot(*_smoothed(train), color="#1f5fa8", linewidth=1.8, label="training, smoothed")
    if validation:
        style = {"marker": "o", "markersize": 4, "linewidth": 0.8, "linestyle": ":"}
        axes.plot(*zip(*validation, strict=True), color="#c2410c", label="validation", **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _save(figure, path)


def ladder(answers: dict[str, tuple[float, float, float]], divergences: dict[str, float], path: Path) -> None:
    """Draw what is left at every rung: right answers, and divergence from the rung before.

    Args:
        answers: rung -> (share of right answers, ends of its 95 % interval).
        divergences: rung -> mean KL divergence in nats per token.
        path: the SVG file to write.
    """
    figure, axes = _figure()
    names = list(answers)
    shares = [answers[name][0] for name in names]
    low = [max(0.0, answers[name][0] - answers[name][1]) for name in names]
    high = [max(0.0, answers[name][2] - answers[name][0]) for name in names]
    axes.errorbar(range(len(names)), shares, yerr=[low, high], color="#1f5fa8", marker="o", capsize=3, linewidth=1.2)
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("right answers", color="#1f5fa8")
    # parse_math: a name is no formula. Turned where there is no room for all of them side by side.
    slanted = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if len(names) > 6 else {}
    axes.set_xticks(range(len(names)), names, parse_math=False, **slanted)
    found = [(place, divergences[name]) for place, name in enumerate(names) if divergences.get(name, 0) > 0]
    if found:
        right = axes.twinx()
        right.bar(*zip(*found, strict=True), width=0.25, color="#c2410c", alpha=0.55)
        right.set_yscale("log")
        right.set_ylim(min(1e-8, *(mean / 10 for _, mean in found)), 10)
        right.set_ylabel("mean KL (nats per token)", color="#c2410c")
        right.spines["right"].set_visible(True)
    _save(figure, path)


def _smoothed(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Centred moving averages over a twentieth of the steps."""
    half = max(1, len(points) // 40)
    means = []
    for middle in range(len(points)):
        window = points[max(0, middle - half) : middle + half + 1]
        means.append(sum(value for _, value in window) / len(window))
    return [step for step, _ in points], means


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "pipeline",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None}, transparent=True)

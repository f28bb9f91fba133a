"""The model card that goes with an adapter: a front matter in YAML for the hub, and a page in Markdown."""

import re
from pathlib import Path

from pipeline import __version__
from pipeline.config import Config
from pipeline.resources import resource


def write_model_card(
    path: Path, config: Config, modules: list[str], history: list[dict[str, float]], kept: int
) -> None:
    """Write README.md for an adapter.

    Args:
        path: where.
        config: of the run.
        modules: those that have an adapter.
        history: the losses by step.
        kept: the step whose adapter it is.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    front_matter = ModelCardData(
        base_model=config.model.base,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "sft", "unsloth", "trl"],
    )
    environment = Environment(  # noqa: S701 - Markdown, not HTML
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["plain"] = plain
    template = environment.from_string(resource("templates/model_card.md.j2").read_text(encoding="utf-8"))
    text = template.render(
        front_matter=front_matter.to_yaml(),
        base=config.model.base,
        revision=config.model.revision,
        version=__version__,
        lora=config.lora,
        modules=modules,
        train=config.train,
        steps=max(int(row["step"]) for row in history),
        kept=kept,
        losses=[row["loss"] for row in history if "loss" in row],
        validation={int(row["step"]): row["eval_loss"] for row in history if "eval_loss" in row},
    )
    path.write_text(text, encoding="utf-8")


def plain(text: str) -> str:
    """A text that Markdown shows as it is, in a line or in a table's cell: "my|model" is written "my\\|model"."""
    return re.sub(r"([\\`*_\[\]<>|&#~$])", r"\\\1", " ".join(text.split()))

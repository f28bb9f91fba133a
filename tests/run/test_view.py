"""What a stage sees of the configuration: what it declared, whoever reads it, and an error for everything else."""

from collections.abc import Callable

import pytest
from jinja2 import Environment, StrictUndefined
from support.small_models import make_config

from pipeline.config import Lora, Train
from pipeline.ollama.modelfile_text import served_system
from pipeline.run.view import UndeclaredSetting, View

CONFIG = make_config(
    data={"train": "train.jsonl", "system": "Be brief."},
    lora={"target_modules": "minimal"},
    train={"batch": 2},
    ollama={"parameters": {"temperature": 0}},
)


def seen(*allowed: str) -> View:
    return View(CONFIG, allowed, "made-up")


def batch_of(train: Train) -> int | None:
    return train.batch


def test_what_is_declared_is_as_it_is() -> None:
    view = seen("train.batch", "lora")
    assert view.train.batch == batch_of(view.train) == 2
    assert view.lora.target_modules == "minimal"
    assert view.lora.model_copy(update={"target_modules": "attention"}).target_modules == "attention"
    assert served_system(seen("ollama.system", "data.system")) == "Be brief."  # type: ignore[arg-type]
    parameters = seen("ollama.parameters.num_ctx").ollama.parameters
    assert (parameters.get("num_ctx"), parameters.get("num_ctx", 3)) == (None, 3)
    assert dict(seen("ollama.parameters").ollama.parameters) == {"temperature": 0}


@pytest.mark.parametrize(
    ("read", "key"),
    [
        (lambda view: view.train.seed, "train.seed"),
        (lambda view: batch_of(view.train), "train.batch"),
        (lambda view: view.run_folder, "run.folder"),
        (lambda view: served_system(view), "data.system"),
        (lambda view: view.ollama.parameters.get("temperature"), "ollama.parameters.temperature"),
        (lambda view: dict(view.ollama.parameters), "ollama.parameters"),
        (lambda view: view.train.model_copy(update={"steps": 3}).batch, "train.batch"),
        (lambda view: view.model_copy(update={"train": CONFIG.train}).train.batch, "train.batch"),
        (lambda view: View(view, ("train",), "made-up").model_copy(update={"train": view.train}).lora.r, "lora.r"),
        (lambda view: Environment(undefined=StrictUndefined).from_string("{{ v.r }}").render(v=view.lora), "lora.r"),
    ],
)
def test_what_is_not_declared_is_an_error(read: Callable[[View], object], key: str) -> None:
    view = seen("train.steps", "ollama.system", "lora.target_modules")
    with pytest.raises(UndeclaredSetting, match=f"the stage made-up reads {key}, which its declaration does not name"):
        read(view)


def test_a_section_gives_itself_away_by_no_other_way() -> None:
    view = seen("train")
    for name in ("model_dump", "model_dump_json", "modle"):
        with pytest.raises(AttributeError, match=name):
            getattr(view.train, name)
    assert not isinstance(view.lora, Lora)

"""One rule for the context length, for models with and without a text_config."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.model.config_file import text_config
from pipeline.model.facts import context_of
from pipeline.ollama.parameters import served_context

GEMMA3 = {  # as a multimodal Gemma 3 has it: what is of the language model stands apart
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "tie_word_embeddings": True,
    "text_config": {"model_type": "gemma3_text", "max_position_embeddings": 4096},
    "vision_config": {"hidden_size": 64},
}


@pytest.mark.parametrize(
    ("config", "context", "served"),
    [
        ({"max_position_embeddings": 2048}, 2048, 2048),
        (GEMMA3, 4096, 4096),
        (GEMMA3 | {"max_position_embeddings": 64}, 4096, 4096),
        ({"max_position_embeddings": 512, "text_config": {}}, 512, 512),
        ({"text_config": {}}, None, 8192),
        ({"text_config": None}, None, 8192),
    ],
)
def test_every_reader_takes_the_language_models(
    tmp_path: Path, config: dict[str, Any], context: int | None, served: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_of(tmp_path) == context
    assert served_context(tmp_path, None, 0) == served


def test_what_stands_apart_goes_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA3))
    settings = text_config(tmp_path)
    assert settings["model_type"] == "gemma3_text"
    assert settings["tie_word_embeddings"] is True

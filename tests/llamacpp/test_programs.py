"""Finding llama.cpp's programs."""

import os
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.llamacpp import programs


def test_the_programs_of_the_pin_are_found() -> None:
    for name in ("llama-quantize", "llama-server", "llama-perplexity"):
        assert os.access(programs.program(name), os.X_OK)
    assert (programs.source_tree() / "gguf-py" / "gguf" / "__init__.py").is_file()


def test_a_missing_program_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_LLAMACPP", str(tmp_path))
    monkeypatch.setenv("PIPELINE_LLAMACPP_SOURCE", str(tmp_path))
    with pytest.raises(UserError, match="llama-quantize is not at .*PIPELINE_LLAMACPP names another folder"):
        programs.program("llama-quantize")
    with pytest.raises(UserError, match="converter is not at"):
        programs.source_tree()


def test_without_set_up_the_message_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPELINE_LLAMACPP", raising=False)
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="run `pipeline setup`"):
        programs.program("llama-quantize")

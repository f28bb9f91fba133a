"""A model that stands in an Ollama, held against the folder that it was made from."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import servers
from support.adapters import small_base

from pipeline.config import Verify
from pipeline.errors import UserError
from pipeline.llamacpp.gguf_file import inspect
from pipeline.ollama.parameters import stop_strings
from pipeline.ollama.scratch_model import write_scratch_model
from pipeline.prompt.go_template import derive
from pipeline.prompt.template import ChatTemplate
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.in_ollama import check, file_of
from pipeline.verify.result import FAIL, PASS

NAME = "somebodys:latest"


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("OLLAMA_HOST", servers.ollama().host)
    yield write_scratch_model(tmp_path / "scratch.gguf", ChatTemplate.from_folder(small_base(converts=True)))
    if servers.client().digest(NAME):
        servers.client().unload(NAME)
        servers.client().delete(NAME)


def judged(gguf: Path, template: str, stop: list[str]) -> dict[str, str]:
    client = servers.client()
    body = {"files": {gguf.name: client.upload(gguf)}, "template": template, "parameters": {"stop": stop}}
    client.create(NAME, body)
    settings = Verify(stopping=0, stopping_prompts=1)
    artefacts = Artefacts(settings, small_base(converts=True), gguf, {}, gguf.parent, ollama=NAME)
    return {result.id: result.verdict for result in check(artefacts)}


def test_what_is_sent_is_what_the_folder_says(gguf: Path) -> None:
    template = ChatTemplate.from_folder(small_base(converts=True))
    right, stops = derive(template).template, list(stop_strings(template))
    assert set(judged(gguf, right, stops).values()) == {PASS}
    wrong = judged(gguf, right.replace("<|im_end|>\n", "<|im_end|>\n\n"), stops)
    assert (wrong["ollama.prompt"], wrong["ollama.stop"]) == (FAIL, PASS)
    wrong = judged(gguf, right, ["### "])
    assert (wrong["ollama.prompt"], wrong["ollama.stop"]) == (PASS, FAIL)


def test_its_file_is_found(gguf: Path) -> None:
    judged(gguf, "{{ .Prompt }}", ["a"])
    assert inspect(file_of(NAME)).metadata["general.name"] == "scratch"
    with pytest.raises(UserError, match="--ollama another: there is no such model .*ollama list"):
        file_of("another")

"""How the pinned converter is called."""

import json
from pathlib import Path

import pytest

from pipeline.llamacpp.converter import command


@pytest.mark.parametrize(
    ("rstrip", "name", "expected"),
    [
        (True, None, "phi-3-merged"),
        (True, "mine-tuned", "phi-3-mine-tuned"),
        (True, "Phi-3-mini-tuned", "Phi-3-mini-tuned"),
        (False, None, "merged"),
        (False, "mine-tuned", "mine-tuned"),
        (False, "not-Phi3-tuned", "not-phi_3-tuned"),
    ],
)
def test_llama_cpp_knows_by_the_name_that_tokens_take_white_space(
    tmp_path: Path, rstrip: bool, name: str | None, expected: str
) -> None:
    words = dict.fromkeys(("<unk>", "<s>", "<|endoftext|>"), False)
    words |= dict.fromkeys(("</s>", "<|user|>", "<|end|>"), rstrip)
    tokens = [{"content": word, "rstrip": takes, "special": word != "</s>"} for word, takes in words.items()]
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    arguments = command(tmp_path / "merged", tmp_path / "a.gguf", "f16", name)
    assert arguments[arguments.index("--model-name") + 1] == expected

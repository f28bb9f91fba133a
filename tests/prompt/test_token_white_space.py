"""What special tokens take from the texts beside them: the same when trained and served, or it is said where not."""

import itertools
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support import bases, small_models

from pipeline.errors import UserError
from pipeline.llamacpp.converter import command, convert
from pipeline.llamacpp.library import LlamaModel
from pipeline.llamacpp.programs import source_tree
from pipeline.llamacpp.tokenizer_differences import known_habit
from pipeline.model.base import as_trained
from pipeline.prompt.token_white_space import PHI3, left, parts, taking, taking_in_phi3
from pipeline.prompt.tokenizer import base_tokenizer, load_tokenizer
from pipeline.stages import data

PHI3_WORDS = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|end|>")
SPACES = ("", " ", "\n", "\t \n", "\u00a0", "\n\u3000", "\u2003 \n", "\x85", "\x1c", "\u200b")


@cache
def vocabulary(name: str) -> tuple[Path, Any, list[str]]:
    """A family's tokenizer as a GGUF file, as it is trained, and what was said of it."""
    base = bases.family(name)
    tokenizer, said = load_tokenizer(base, chat_template="phi-3" if name == "Phi-3" else None)
    folder = as_trained(base, tokenizer, small_models.scratch() / f"vocabulary-{name}")
    file = folder / "vocabulary.gguf"
    convert([*command(folder, file, "f16"), "--vocab-only"], folder)
    return file, tokenizer, said


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def test_the_rule_is_that_of_the_pinned_source() -> None:
    source = (source_tree() / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    of_names = re.search(
        r'\{"phi-3", "phi3"\}\)\) \{\s+for \(auto id : cache_special_tokens\)(.*?)\} else', source, re.DOTALL
    )
    assert of_names is not None
    taken, not_taken = re.findall(r"for \(const auto \* token : \{(.*?)\}", of_names[1])
    assert re.findall('"([^"]+)"', taken) == ["</s>"]
    named = re.findall('"([^"]+)"', not_taken)
    assert [word for word, takes in taking_in_phi3(PHI3_WORDS).items() if not takes] == named
    assert PHI3.search("My-Phi-3")
    assert PHI3.search("phi3")
    assert len(re.findall("isspace", source.partition("tokenizer_st_partition")[2])) == 2  # of ASCII


def test_the_name_that_is_nearer() -> None:
    own = taking_in_phi3(PHI3_WORDS)
    assert taking(own) == own
    assert taking(own | {"<call>": False}) == own | {"<call>": True}  # one more, beside Phi-3's
    assert not any(taking(dict.fromkeys(PHI3_WORDS, False) | {"<mask>": True}).values())
    assert not any(taking({"<|im_start|>": True, "<|endoftext|>": False}).values())  # it would not load


@pytest.mark.parametrize("name", ["Phi-3", "Phi-4"])
def test_the_ids_are_those_of_llama_cpp(name: str) -> None:
    file, tokenizer, _ = vocabulary(name)
    special = ("<|user|>", "<|end|>", "<s>", "</s>") if name == "Phi-3" else ("<|im_start|>", "<|im_sep|>")
    texts = [f"a{before}{token}{after}b" for token in special for before, after in itertools.product(SPACES, SPACES)]
    with LlamaModel(file, vocabulary_only=True) as llama_cpp:
        for text in texts:
            served = llama_cpp.tokenize(text, add_special=False)
            assert [id for part in parts(tokenizer, text) for id in ids(tokenizer, part)] == served, text
            assert bool(left(tokenizer, text)) == (ids(tokenizer, text) != served), text
    assert any(left(tokenizer, text) for text in texts) == (name == "Phi-3")


def test_what_llama_cpp_takes_from_no_text_is_not_taken_in_training() -> None:
    _, tokenizer, said = vocabulary("Phi-4")
    assert "no white space is taken from the texts beside <|" in said[0]
    own = base_tokenizer(bases.family("Phi-4"))
    text = "<|im_start|>user\n  Hi \n<|im_end|>"
    assert ids(own, text) == ids(own, "<|im_start|>user\n  Hi<|im_end|>") != ids(tokenizer, text)
    assert tokenizer.decode(ids(tokenizer, text)) == text
    (only,) = vocabulary("Phi-3")[2]
    assert only.startswith("model.chat_template")


def test_another_programs_export_is_explained() -> None:
    """A tokenizer that nobody has changed, and what llama.cpp makes of it."""
    file, _, _ = vocabulary("Phi-4")
    own, text = base_tokenizer(bases.family("Phi-4")), "<|im_start|> Hi"
    with LlamaModel(file, vocabulary_only=True) as llama_cpp:
        served = llama_cpp.tokenize(text)
        assert served != ids(own, text)
        assert "no white space is taken" in known_habit(llama_cpp, own, text, served, add_special=False)
        assert known_habit(llama_cpp, own, text, served[::-1], add_special=False) == ""


def rows_of(folder: Path, name: str, *contents: str) -> Path:
    path = folder / f"{name}.jsonl"
    answer = {"role": "assistant", "content": f"Yes, {name}."}
    rows = [{"messages": [{"role": "user", "content": content}, answer]} for content in contents]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_that_would_be_served_with_other_ids_are_named(tmp_path: Path) -> None:
    fine = ("One", "Two \u3000", "\n Three", "Four\n\u3000", "Five")
    train = rows_of(tmp_path, "train", *fine, "\u3000Six")
    validation = rows_of(tmp_path, "validation", "Seven", "\n\u00a0Eight")
    test = rows_of(tmp_path, "test", "Nine", "Ten", "\u2003Eleven")

    def prepare(**settings: Any) -> Any:
        config = {"train": str(train), "validation": str(validation), "test": str(test), **settings}
        model = {"base": str(bases.family("Phi-3")), "chat_template": "phi-3"}
        task = small_models.make_task(tmp_path / "run", "data", model=model, data=config, train={"max_length": 128})
        return task, data.main(task)

    with pytest.raises(UserError, match=r"test\.jsonl:3: has the white space U\+2003 after <\|user\|>.*on_error"):
        prepare()
    task, figures = prepare(on_error="skip", skip_limit=0.5)
    assert (figures["train_rows"], figures["validation_rows"], figures["test_rows"]) == (len(fine), 1, 2)
    said = " ".join(task.warnings)
    for words in ("train.jsonl:6: has the white space U+3000", "validation.jsonl:2: has the white space U+00A0"):
        assert words in said
    test.write_text(test.read_text().splitlines()[0] + "\n")
    text = tmp_path / "texts.jsonl"
    text.write_text('{"text": "All is well."}\n{"text": "So <|end|>\\u3000it is."}\n')
    with pytest.raises(UserError, match=r"texts\.jsonl:2: has the white space U\+3000 after <\|end\|>"):
        prepare(train=str(text), format="text", control_tokens="keep", validation=None, test=None)

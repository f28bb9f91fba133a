"""The tokenizer that a model is trained with reads every text as llama.cpp will."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import bases, small_models
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from pipeline.data.token_file import read_tokens
from pipeline.errors import UserError
from pipeline.llamacpp.programs import source_tree
from pipeline.prompt.control_tokens import CONTROL_WORDS
from pipeline.prompt.tokenizer import Saved, as_served, base_tokenizer, load_tokenizer, read_saved, saved_tokenizer
from pipeline.stages import data

DECOMPOSED, COMPOSED = "cafe\u0301", "caf\u00e9"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str], Any]:
    """As it is trained, what was changed, and that again from its files."""
    tokenizer, changes = load_tokenizer(bases.short("qwen3"))
    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer.save_pretrained(folder)
    return tokenizer, changes, AutoTokenizer.from_pretrained(folder)


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def test_the_words_are_those_of_the_pinned_source() -> None:
    source = (source_tree() / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    end_of_generation = source.partition("special_eog_ids.clear()")[2].partition("quick hack")[0]
    assert set(re.findall(r't\.first == "([^"]+)"', end_of_generation)) == CONTROL_WORDS


def test_texts_are_not_normalised(qwen: tuple[Any, list[str], Any]) -> None:
    own = AutoTokenizer.from_pretrained(bases.short("qwen3"))
    assert ids(own, DECOMPOSED) == ids(own, COMPOSED)
    tokenizer, changes, again = qwen
    assert "texts are not normalised (NFC)" in changes[0]
    for read in (tokenizer, again):
        assert ids(read, COMPOSED) == ids(own, COMPOSED)
        assert ids(read, DECOMPOSED) != ids(own, COMPOSED)
        assert read.decode(ids(read, DECOMPOSED)) == DECOMPOSED


def test_control_words_are_one_token(qwen: tuple[Any, list[str], Any]) -> None:
    tokenizer, changes, again = qwen
    assert "special tokens in a text: </s>" in changes[0]
    end = tokenizer.get_vocab()["</s>"]
    for read in (tokenizer, again):
        assert ids(read, "a</s>b") == [*ids(read, "a"), end, *ids(read, "b")]
        assert len(read) == len(tokenizer)


def test_nothing_else_changes(qwen: tuple[Any, list[str], Any]) -> None:
    own = AutoTokenizer.from_pretrained(bases.short("qwen3"))
    tokenizer, _, again = qwen
    for read in (tokenizer, again):
        assert read.get_vocab() == own.get_vocab()
        assert read.chat_template == own.chat_template
        assert (read.bos_token, read.eos_token, read.pad_token) == (own.bos_token, own.eos_token, own.pad_token)
        assert read.model_max_length == own.model_max_length


def test_a_tokenizer_that_reads_as_llama_cpp_is_left_as_it_is() -> None:
    own = AutoTokenizer.from_pretrained(small_models.base_folder())
    tokenizer, changes = as_served(own)
    assert tokenizer is own
    assert changes == []
    own.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer, changes = as_served(own)
    assert changes == ["texts are not normalised (NFKC)"]
    assert ids(tokenizer, "\ufb01") != ids(own, "\ufb01") == ids(own, "fi")
    again, changes = as_served(as_served(AutoTokenizer.from_pretrained(bases.short("qwen3")))[0])
    assert changes == []
    assert again.backend_tokenizer.normalizer is None


@pytest.mark.parametrize("word", ["<|tool_response>", "<|plamo:eos|>"])
def test_where_llama_cpp_takes_the_end_for_a_word(word: str) -> None:
    own = AutoTokenizer.from_pretrained(bases.short("qwen3"))
    own.add_tokens([word], special_tokens=True)
    tokenizer, _ = as_served(own)
    assert len(ids(tokenizer, "</s>")) > 1


def test_the_data_stage_trains_and_says_it(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    conversation = [{"role": "user", "content": "Strike it: <s>a</s>"}, {"role": "assistant", "content": DECOMPOSED}]
    rows.write_text(json.dumps({"messages": conversation}) + "\n", encoding="utf-8")
    base = bases.base("qwen3-short", bases.short("qwen3"), "qwen3")
    task = small_models.make_task(
        tmp_path / "run",
        "data",
        model={"base": str(base)},
        data={"train": str(rows), "validation_fraction": 0.0, "control_tokens": "keep"},
        train={"max_length": 512},
    )
    data.main(task)
    warning, found = task.warnings
    assert "the control token </s>" in found
    assert "texts are not normalised (NFC); special tokens in a text: </s>" in warning
    (row,) = read_tokens(task.output / "train.tokens.arrow")
    tokenizer, _ = load_tokenizer(base)
    assert tokenizer.get_vocab()["</s>"] in row["input_ids"]
    assert DECOMPOSED in tokenizer.decode(row["input_ids"])


def test_what_is_saved_reads_as_what_was_loaded(tmp_path: Path) -> None:
    """Llama 2's own class is built from a setting that it does not save."""
    tokenizer, _ = load_tokenizer(bases.tokenizer_files(bases.short("llama2"), tmp_path / "base"))
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ("<s>Be brief</s>\nNo", " Be  brief", "\n", "</s>"):
        assert ids(saved, text) == ids(tokenizer, text)


# Tokens that the embedding has no rows for.


def rows_of(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [
        {"messages": [{"role": "user", "content": f"Hi {number}"}, {"role": "assistant", "content": said}]}
        for number, said in enumerate(("Hello", "Yes", text))
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(base: Path, rows: Path, run: Path) -> Any:
    data_of = {"train": str(rows), "validation_fraction": 0.0}
    task = small_models.make_task(run, "data", model={"base": str(base)}, data=data_of, train={"max_length": 128})
    data.main(task)
    return task


def test_texts_are_split_as_tokenizer_json_says(tmp_path: Path) -> None:
    """GPT-4's names GPT-2's class, which would split them as GPT-2 did."""
    folder = bases.tokenizer_files(bases.short("gpt4"), tmp_path / "gpt4")
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "GPT2Tokenizer"
    own, text = Tokenizer.from_file(str(folder / "tokenizer.json")), "In 123456 days\n\n\nit'll"
    assert ids(base_tokenizer(folder), text) == own.encode(text, add_special_tokens=False).ids
    assert ids(AutoTokenizer.from_pretrained(folder), text) != ids(base_tokenizer(folder), text)


def test_tokens_without_a_row_are_ordinary_text() -> None:
    """Gemma 3's text models: the last token, that of an image, has no row."""
    words = len(AutoTokenizer.from_pretrained(bases.short("gemma3")))
    base = bases.base("gemma3-without-row", bases.short("gemma3"), "gemma3_text", rows=words - 1)
    own = AutoTokenizer.from_pretrained(base)
    assert own.get_vocab()["<image_soft_token>"] == words - 1
    tokenizer, said = load_tokenizer(base)
    assert len(tokenizer) == words - 1
    assert "<image_soft_token> have no row" in said[0]
    assert f"{words:,} tokens" in said[0]
    assert f"{words - 1:,} rows" in said[0]
    for text in ("Hello there, 你好", "<start_of_turn>user\nHi<end_of_turn>\n"):
        assert ids(tokenizer, text) == ids(own, text)
    assert max(ids(tokenizer, "<image_soft_token>")) < words - 1


def test_added_tokens_without_rows(tmp_path: Path) -> None:
    """Three tokens added to a base, and its embedding not resized: as long as none is written, none is missed."""
    base = bases.base("added-short", small_models.BASE, rows=49152)
    own = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    for number, word in enumerate(("<lamp>", "<room>", "<end_call>")):
        token = {"id": 49152 + number, "content": word, "special": number == 2}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        own["added_tokens"].append(token | flags)
    (base / "tokenizer.json").write_text(json.dumps(own), encoding="utf-8")
    (warning,) = prepare(base, rows_of(tmp_path, "Fine"), tmp_path / "run").warnings
    assert "<lamp>, <room>, <end_call> have no row in the embedding (the tokenizer has 49,155 tokens" in warning
    with pytest.raises(UserError, match=r"rows.jsonl:3: '<lamp>' is token 49,152 .* 49,152 rows for 49,155 tokens"):
        prepare(base, rows_of(tmp_path, "<lamp> on"), tmp_path / "run")
    with pytest.raises(UserError, match=r"chat template: '<room>' is token 49,153"):
        file = tmp_path / "own.jinja"
        file.write_text("<room>{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
        task = small_models.make_task(
            tmp_path / "run",
            "data",
            model={"base": str(base), "chat_template": str(file)},
            data={"train": str(rows_of(tmp_path, "Fine")), "validation_fraction": 0.0},
            train={"max_length": 128},
        )
        data.main(task)
    settings = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<end_call>"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"its eos_token .*49,155 tokens, it 49,152 rows.*resize_token_embeddings"):
        load_tokenizer(base)


@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_a_saved_tokenizer_is_read_from_its_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.prompt import tokenizer as module

    source = (
        small_models.base_folder()
        if name == "smollm2"
        else bases.tokenizer_files(bases.short(name), tmp_path / "source")
    )
    loaded = AutoTokenizer.from_pretrained(source)
    loaded.save_pretrained(tmp_path / "saved")
    expected = Saved(loaded.bos_token_id, loaded.eos_token_id, len(loaded), loaded.chat_template)
    with monkeypatch.context() as patch:
        patch.delattr(module, "saved_tokenizer")  # it need not be loaded
        assert read_saved(tmp_path / "saved") == expected
    settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    del settings["eos_token"]  # a family's class may know its own
    (tmp_path / "saved" / "tokenizer_config.json").write_text(json.dumps(settings))
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert read_saved(tmp_path / "saved").eos == again.eos_token_id


def test_what_was_saved_is_loaded_as_it_was_beside_a_configuration_too(tmp_path: Path) -> None:
    """Beside a Qwen2's config.json transformers takes a class of its own, which normalises again."""
    base = bases.tokenizer_files(bases.short("qwen2_5"), tmp_path / "base")
    (base / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 151936}')
    tokenizer, _ = load_tokenizer(base)
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_bytes((base / "config.json").read_bytes())
    assert ids(saved_tokenizer(tmp_path / "saved"), DECOMPOSED) == ids(tokenizer, DECOMPOSED)
    assert ids(tokenizer, DECOMPOSED) != ids(tokenizer, COMPOSED)


def test_the_same_files_are_loaded_once_and_others_for_themselves(tmp_path: Path) -> None:
    for name in ("one", "other"):
        shutil.copytree(bases.short("qwen3"), tmp_path / name)
    one, other = (saved_tokenizer(tmp_path / name) for name in ("one", "other"))
    assert saved_tokenizer(tmp_path / "one") is one
    assert one.backend_tokenizer is other.backend_tokenizer
    assert [Path(tokenizer.name_or_path).name for tokenizer in (one, other)] == ["one", "other"]
    (tmp_path / "other" / "chat_template.jinja").write_text("changed", encoding="utf-8")
    assert saved_tokenizer(tmp_path / "other").chat_template == "changed"
    assert one.chat_template == other.chat_template != "changed"

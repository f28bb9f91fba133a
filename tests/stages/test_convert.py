"""The convert stage with the real converter: on the packaged base, and on folders that it must refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import small_models

from pipeline.errors import PipelineError
from pipeline.llamacpp.gguf_file import inspect
from pipeline.model.weights_file import read_weights
from pipeline.stages import convert


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A copy of the base as a merged model, its weights linked."""
    folder = tmp_path / "merge" / "model"
    folder.mkdir(parents=True)
    for file in small_models.base_folder().iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file)
        else:
            shutil.copyfile(file, folder / file.name)
    return folder


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_base_converts_to_its_own_gguf() -> None:
    path, figures, task = small_models.converted()
    ours, original = inspect(path), inspect(small_models.original_gguf())
    assert path.name == "model-f16.gguf"  # as the base is stored
    for key in (
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.unknown_token_id",
        "tokenizer.ggml.add_bos_token",
        "tokenizer.chat_template",
        "llama.rope.freq_base",
        "llama.attention.layer_norm_rms_epsilon",
        "llama.context_length",
        "llama.attention.head_count_kv",
    ):
        assert ours.metadata[key] == original.metadata[key], key
    assert {t.name: t.shape for t in ours.tensors} == {t.name: t.shape for t in original.tensors}
    assert figures["parameters"] == 134_515_008
    assert figures["bytes"] == path.stat().st_size
    assert (figures["tokenizer"], figures["pre_tokenizer"]) == ("gpt2", "smollm")
    assert task.warnings == []
    assert [Path(argument).name for argument in task.commands[0][1:3]] == ["convert_hf_to_gguf.py", "model"]


def test_an_unknown_pre_tokenizer_is_explained(merged: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((merged / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    (merged / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(PipelineError, match="does not know how this tokenizer splits text"):
        convert.main(small_models.make_task(tmp_path, "convert"))


def test_an_unknown_architecture_is_explained(merged: Path, tmp_path: Path) -> None:
    edit(merged / "config.json", architectures=["NoSuchForCausalLM"])
    with pytest.raises(PipelineError, match="no converter for this architecture"):
        convert.main(small_models.make_task(tmp_path, "convert"))


def test_a_full_disk_is_said(merged: Path, tmp_path: Path) -> None:
    """/dev/full answers every write as a full disk does."""
    task = small_models.make_task(tmp_path, "convert")
    (task.output / "model-f16.gguf").symlink_to("/dev/full")
    with pytest.raises(PipelineError, match="disk is full"):
        convert.main(task)


class TestChecks:
    """The look at the written file, against a merged folder that was changed after it."""

    def check(self, merged: Path, tmp_path: Path) -> None:
        info = inspect(small_models.converted()[0])
        task = small_models.make_task(tmp_path, "convert")
        convert.check_against(info, read_weights(merged), task)

    def test_the_same_folder_passes(self, merged: Path, tmp_path: Path) -> None:
        self.check(merged, tmp_path)

    def test_another_eos(self, merged: Path, tmp_path: Path) -> None:
        edit(merged / "tokenizer_config.json", eos_token="<|endoftext|>")
        with pytest.raises(PipelineError, match="other special tokens than were trained: eos 2 instead of 0"):
            self.check(merged, tmp_path)

    def test_a_chat_template_that_differs_by_a_space(self, merged: Path, tmp_path: Path) -> None:
        template = merged / "chat_template.jinja"
        template.write_text(template.read_text().replace("assistant\n", "assistant \n"))
        with pytest.raises(PipelineError, match="chat template is not the trained one"):
            self.check(merged, tmp_path)

    def test_a_parameter_more(self, merged: Path, tmp_path: Path) -> None:
        import numpy as np
        from safetensors.numpy import save_file

        shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        (merged / "model.safetensors").rename(merged / shards[0])
        save_file({"model.extra.weight": np.ones(7, np.float16)}, merged / shards[1])
        index = {"weight_map": dict(enumerate(shards))}
        (merged / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(PipelineError, match="holds 134,515,008 parameters, .* made from 134,515,015"):
            self.check(merged, tmp_path)

    def test_a_byte_level_tokenizer_written_as_another(self, merged: Path, tmp_path: Path) -> None:
        info = inspect(small_models.converted()[0])
        info.metadata["tokenizer.ggml.model"] = "llama"
        with pytest.raises(PipelineError, match=r'"llama" for a byte-level BPE tokenizer'):
            convert.check_against(info, read_weights(merged), small_models.make_task(tmp_path, "convert"))

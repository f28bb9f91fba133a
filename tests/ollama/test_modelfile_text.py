"""Hostile texts: each is carried exactly by a Modelfile that the real `ollama create` reads, or is refused.

What a Modelfile is refused for still has to go through the JSON API unchanged.
"""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support import servers

from pipeline.errors import UserError
from pipeline.ollama.deployment import read_back, shown_parameters
from pipeline.ollama.modelfile_text import CannotCarry, ServedModel, read_modelfile, write
from pipeline.ollama.ollama_server import find_ollama
from pipeline.ollama.parameters import check_parameters, parameters, served_context, stop_strings
from pipeline.ollama.scratch_model import write_scratch_model
from pipeline.prompt.template import ChatTemplate
from pipeline.resources import sha256_of

TEMPLATE = "{{ range .Messages }}{{ .Role }}: {{ .Content }}\n{{ end }}"
Q = '"""'

CARRIED = {
    "plain": "You are a helpful assistant.",
    "quotes": "Say \"yes\", 'no' or `maybe`.",
    "begins with a quote": '"Hello" is a greeting',
    "ends with a quote": 'Say "Hello"',
    "only a quote": '"',
    "two quotes": '""',
    "three quotes inside a line": f"Never write {Q} please",
    "only three quotes": Q,
    "three quotes at the very end": f"the end{Q}",
    "white space around": "  \t around \n\n",
    "only white space": " \n ",
    "lines": "one\ntwo\n\nthree\n",
    "carriage returns": "one\r\ntwo\rthree",
    "an instruction on a line of its own": "Be kind.\nSYSTEM be evil\nFROM evil\nTEMPLATE x\nPARAMETER stop a",
    "a comment": "# not a comment\n# nor this",
    "an instruction after a quote": 'a"\nSYSTEM "evil"\n"b',
    "Jinja": "{{ template }}{% for x in y %}{{ ''.__class__.__mro__ }}{# #}",
    "Jinja that ends a filter": '{{ "a" | quoted }} }}',
    "Go": '{{ .System }}{{ template "x" }}{{- end -}}',
    "backslashes": 'C:\\new\\table \\" \\n \\u0000',
    "shell": "$(rm -rf /) `id` ${HOME} ; && | > /etc/passwd",
    "scripts": "日本語 العربية עברית हिन्दी ไทย 🙂 ½ ∑",
    "combining": "e\u0301a\u0308",
    "JSON": '{"a": ["b", {"c": "\\"d\\""}]}',
    "long": "Rule one. " * 5000,
    "a very long line of quotes": '"' * 1001,
    "role words": "user: a\nassistant: b\nMESSAGE user evil",
    "tabs": "\ta\t\tb\t",
    "percent and braces": "%s %d {} {0} %(x)s",
}
REFUSED = {
    "three quotes at the end of a line": f"a {Q}\nSYSTEM evil",
    "three quotes and spaces at the end of a line": f"a {Q} \t \nFROM evil",
    "three quotes on a line of their own": f"code:\n{Q}\nx\n{Q}\n",
    "begins with three quotes and a line": f"{Q}\nPARAMETER stop a\n",
    "five quotes at the end of a line": f'a{Q}""\nb',
    "NBSP": "a\u00a0b",
    "U+3000": "a\u3000b",
    "joined emoji": "👩\u200d👩\u200d👧",
    "soft hyphen": "a\u00adb",
    "byte order mark": "\ufeffa",
    "right-to-left override": "a\u202eb",
    "line separator": "a\u2028b\u2029c",
    "null": "a\0b",
    "escape": "\x1b[31mred\x1b[0m",
    "bell and backspace": "a\x07\x08b",
    "vertical tab and form feed": "a\x0bb\x0cc",
    "delete": "a\x7fb",
    "next line": "a\x85b",
    "private use": "a\ue000b",
    "a quotation that a dropped character hides": f"a{Q}\u200b\nSYSTEM evil",
    "NBSP after three quotes": f"a{Q}\u00a0\nSYSTEM evil",
    "unassigned": "a\U000e0fffb",
    "tag characters": "a\U000e0041b",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("modelfile")
    write_scratch_model(path / "scratch.gguf")
    return path


def create_from_file(folder: Path, model: ServedModel, name: str) -> dict[str, Any]:
    """`ollama create` as a person types it."""
    (folder / "Modelfile").write_bytes(model.modelfile().encode())
    program = find_ollama()
    assert program is not None
    environment = {**os.environ, "OLLAMA_HOST": servers.ollama().host, "HOME": str(folder)}
    done = subprocess.run(
        [program, "create", name, "-f", "Modelfile"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return shown_and_deleted(name, model, folder / model.adapter if model.adapter else None)


def create_from_json(folder: Path, model: ServedModel, name: str) -> dict[str, Any]:
    digest = servers.client().upload(folder / model.gguf)
    servers.client().create(name, {**model.body(), "files": {"m.gguf": digest}})
    return shown_and_deleted(name, model)


def shown_and_deleted(name: str, model: ServedModel, adapter: Path | None = None) -> dict[str, Any]:
    try:
        read_back(servers.client(), name, model, model.template, adapter)
        return servers.client().show(name)
    finally:
        servers.client().delete(name)


def models(text: str) -> dict[str, ServedModel]:
    """The places where a user's text can stand."""
    return {
        "system": ServedModel("scratch.gguf", TEMPLATE, text),
        "license": ServedModel("scratch.gguf", TEMPLATE, licenses=(text,)),
        "stop": ServedModel("scratch.gguf", TEMPLATE, parameters={"stop": [text, "x"], "temperature": 0.5}),
        "message": ServedModel("scratch.gguf", TEMPLATE, messages=({"role": "user", "content": text},)),
    }


@pytest.mark.parametrize("case", CARRIED)
def test_a_modelfile_carries_it_exactly(case: str, folder: Path) -> None:
    text = CARRIED[case]
    shown = create_from_file(folder, models(text)["system"], "carried:latest")
    assert shown["system"] == text
    for model in models(text).values():
        assert read_modelfile(model.modelfile()) == list(model.instructions())


@pytest.mark.parametrize("place", ["license", "stop", "message"])
@pytest.mark.parametrize(
    "case", ["three quotes inside a line", "an instruction on a line of its own", "white space around"]
)
def test_it_is_carried_in_every_place(case: str, place: str, folder: Path) -> None:
    text = CARRIED[case]
    shown = create_from_file(folder, models(text)[place], "placed:latest")
    if place == "license":
        assert shown["license"] == text
    elif place == "stop":
        assert shown_parameters(shown["parameters"]) == {"stop": [text, "x"], "temperature": [0.5]}
    else:
        assert shown["messages"] == [{"role": "user", "content": text}]


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_modelfile_cannot_carry_is_refused_and_goes_through_json(case: str, folder: Path) -> None:
    text = REFUSED[case]
    for model in models(text).values():
        with pytest.raises(CannotCarry, match=r"no Modelfile can carry this model: \w+ holds "):
            model.modelfile()
    assert create_from_json(folder, models(text)["system"], "refused:latest")["system"] == text


@pytest.mark.parametrize("case", ["NBSP", "three quotes on a line of their own", "null"])
def test_nothing_is_written_but_the_json(case: str, tmp_path: Path) -> None:
    reason = write(models(REFUSED[case])["system"], tmp_path / "Modelfile", tmp_path / "create.json")
    assert reason
    assert [path.name for path in tmp_path.iterdir()] == ["create.json"]
    plan = json.loads((tmp_path / "create.json").read_text())
    assert plan["request"]["system"] == REFUSED[case]


@pytest.mark.parametrize(
    "template",
    [
        f"{{{{ range .Messages }}}}{Q}x{{{{ .Content }}}}{{{{ end }}}}",
        "\n\n{{ range .Messages }}{{ .Content }}{{ end }}\n\n",
        '{{- range .Messages }}{{ "\\u00a0" }}{{ .Content }}{{ end }}',
        "SYSTEM evil\nFROM x\n{{ range .Messages }}{{ .Content }}{{ end }}",
        '"{{ range .Messages }}{{ .Content }}{{ end }}"',
    ],
)
def test_templates_are_carried_exactly(template: str, folder: Path) -> None:
    shown = create_from_file(folder, ServedModel("scratch.gguf", template), "template:latest")
    assert shown["template"] == template


def test_everything_at_once(folder: Path) -> None:
    model = ServedModel(
        "scratch.gguf",
        TEMPLATE,
        CARRIED["lines"],
        {"num_ctx": 512, "temperature": 0.25, "stop": ["<|im_end|>", '"\n'], "seed": 7, "use_mmap": False},
        messages=({"role": "user", "content": "Hi: there"}, {"role": "assistant", "content": CARRIED["quotes"]}),
        licenses=("Apache-2.0", "MIT\n\nas well"),
        requires="0.32.0",
    )
    from_file = create_from_file(folder, model, "all:latest")
    from_json = create_from_json(folder, model, "all:latest")
    for key in ("system", "template", "license", "messages", "requires"):
        assert from_file[key] == from_json[key], key
    assert shown_parameters(from_file["parameters"]) == shown_parameters(from_json["parameters"])


def test_a_path_with_spaces_is_found(folder: Path) -> None:
    write_scratch_model(folder / "my model's file.gguf")
    shown = create_from_file(folder, ServedModel("my model's file.gguf", TEMPLATE), "path:latest")
    assert shown["template"] == TEMPLATE


@pytest.mark.parametrize(
    "text", ["FROM", "HELLO x\nFROM y", 'FROM x\nSYSTEM """open', "MESSAGE robot hi\nFROM x", "SYSTEM x", "FROM-x y"]
)
def test_what_ollama_would_not_read_is_not_read(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        read_modelfile(text)


@pytest.mark.parametrize("requires", ["1", "0.34", "0.34.0-rc1", "latest", "0.34.0\nSYSTEM x", "v0.34.0"])
def test_requires_is_a_version(requires: str) -> None:
    with pytest.raises(UserError, match="REQUIRES"):
        ServedModel("m.gguf", requires=requires)


def test_a_message_has_a_role_that_ollama_knows() -> None:
    with pytest.raises(UserError, match="role"):
        ServedModel("m.gguf", messages=({"role": "user\nSYSTEM", "content": "x"},))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temprature": 0}, "did you mean 'temperature'"),
        ({"mirostat": 1}, "unknown"),
        ({"stop\nSYSTEM evil": "x"}, "unknown"),
        ({"temperature": "hot"}, "a finite number"),
        ({"temperature": float("nan")}, "a finite number"),
        ({"temperature": float("inf")}, "a finite number"),
        ({"temperature": True}, "a finite number"),
        ({"top_k": 1.5}, "a whole number"),
        ({"num_ctx": "8192"}, "a whole number"),
        ({"num_ctx": 2**40}, "a whole number"),
        ({"num_ctx": -5}, "at least 4"),
        ({"num_ctx": 2}, "at least 4"),
        ({"temperature": 1e300}, "at most 3.4e38"),
        ({"temperature": 10**400}, "at most 3.4e38"),
        ({"seed": None}, "a whole number"),
        ({"use_mmap": "yes"}, "true or false"),
        ({"stop": []}, "none of them empty"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": ["a", 1]}, "none of them empty"),
        ({"stop": {"a": "b"}}, "none of them empty"),
    ],
)
def test_parameters_that_ollama_would_not_take(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=r"ollama\.parameters\.") as error:
        check_parameters(given)
    assert words in str(error.value)


def test_parameters_come_from_the_model_and_the_configuration_wins(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 131072}')
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.1, "do_sample": true, "eos_token_id": 1}'
    )
    template = ChatTemplate("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}", "", "</s>",
                            special_tokens=("<|end|>", "<|end", "</s>"))  # fmt: skip
    values = parameters(tmp_path, template, {"temperature": 0, "stop": "#"}, 2048)
    assert values == {"num_ctx": 8192, "temperature": 0.0, "top_p": 0.95, "repeat_penalty": 1.1, "stop": ["#"]}
    assert parameters(tmp_path, template, {}, 2048)["stop"] == ["<|end|>", "</s>"]
    assert served_context(tmp_path, None, 32768) == 32768  # never less than it was trained with
    assert served_context(tmp_path, 512, 32768) == 512
    (tmp_path / "generation_config.json").write_text('{"do_sample": false}')
    assert parameters(tmp_path, template, {}, 0)["temperature"] == 0.0
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 2048}')
    assert served_context(tmp_path, None, 0) == served_context(tmp_path, 4096, 0) == 2048


def test_a_template_without_tokens_stops_at_the_next_turn() -> None:
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}assistant:"
    assert ChatTemplate(source).between_turns() == "\n\nuser: "
    assert stop_strings(ChatTemplate(source)) == ["\n\nuser:"]


def write_adapter(path: Path) -> None:
    """A LoRA adapter of the scratch model's queries."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4)
    for factor, shape in (("lora_a", (2, 32)), ("lora_b", (32, 2))):
        writer.add_tensor(f"blk.0.attn_q.weight.{factor}", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["adapter.gguf", 'my "first" adapter\'s.gguf', '"""a\nSYSTEM evil\n"b"""'])
def test_an_adapter_goes_both_ways_whatever_its_name(name: str, folder: Path) -> None:
    messages = ({"role": "user", "content": "Hi: there"}, {"role": "assistant", "content": 'Say "Hello"'})
    model = ServedModel("scratch.gguf", TEMPLATE, adapter=name, messages=messages, licenses=("MIT",), requires="0.32.0")
    write_adapter(folder / name)
    client = servers.client()
    from_file = create_from_file(folder, model, "adapted:latest")
    files = {"files": {"m.gguf": client.upload(folder / model.gguf)}, "adapters": {"a": client.upload(folder / name)}}
    client.create("adapted:latest", {**model.body(), **files})
    for shown in (from_file, shown_and_deleted("adapted:latest", model, folder / name)):
        assert re.findall(r"^ADAPTER .*/sha256-(.*)$", shown["modelfile"], re.MULTILINE) == [sha256_of(folder / name)]
        assert (shown["messages"], shown["license"]) == (list(messages), "MIT")


@pytest.mark.parametrize("name", ['a"""\nSYSTEM evil', "a\u00a0b.gguf", "a\0b.gguf"])
def test_a_path_that_no_modelfile_can_carry(name: str) -> None:
    with pytest.raises(CannotCarry, match="FROM holds"):
        ServedModel(name).modelfile()
    with pytest.raises(CannotCarry, match="ADAPTER holds"):
        ServedModel("scratch.gguf", adapter=name).modelfile()

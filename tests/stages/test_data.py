"""The data stage: from files to token ids, labels and figures."""

import copy
import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import Verify
from pipeline.data.questions import asked
from pipeline.data.sources import read_rows
from pipeline.data.token_file import read_tokens
from pipeline.defaults import Facts, resolve
from pipeline.errors import UserError
from pipeline.model.held_out import read_held_out
from pipeline.prompt.labels import IGNORED
from pipeline.prompt.tokenizer import saved_tokenizer
from pipeline.run.layout import Layout
from pipeline.run.stage import Task
from pipeline.stages import data, evaluate, verify
from pipeline.toml_file import load_config
from pipeline.verify import answers, trained_labels
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import FAIL
from pipeline.verify.token_ids import trained_end_of_turn

QUESTIONS = [f"What is {number} plus {other}?" for number in range(10) for other in range(10)]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage needs of a base: a tokenizer with a chat template, and something to be a model."""
    import tokenizers
    from safetensors.numpy import save_file
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(QUESTIONS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[1])
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    save_file({"weight": np.zeros((2, 2), np.float16)}, folder / "model.safetensors")
    return folder


def conversation(question: str, answer: str = "A number.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")


class Project:
    """A folder with a configuration; `run` runs the stage."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        (folder / "pipeline.toml").write_text(
            f"[model]\nbase = {json.dumps(str(base))}\n[data]\ntrain = 'train.jsonl'\n", encoding="utf-8"
        )
        write(folder / "train.jsonl", [conversation(question) for question in QUESTIONS])

    def run(self, *overrides: str, name: str = "output") -> dict[str, Any]:
        config, _ = load_config(self.folder / "pipeline.toml", ["train.max_length=256", *overrides])
        self.output = self.folder / name
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()
        self.config = config
        self.task = Task(data.STAGE, config, self.folder, self.output)
        return data.main(self.task)

    def account(self, name: str) -> dict[str, Any]:
        account: dict[str, Any] = json.loads((self.output / "data.json").read_text(encoding="utf-8"))["account"][name]
        return account

    def rows(self, name: str) -> list[dict[str, Any]]:
        return list(read_rows(self.output / f"{name}.jsonl"))


@pytest.fixture
def project(tmp_path: Path, base: Path) -> Project:
    return Project(tmp_path, base)


def test_what_is_left_out_of_a_vision_language_base_is_said(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "vision"
    shutil.copytree(base, folder)
    settings = {"model_type": "llama", "vision_config": {"hidden_size": 64}}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    project = Project(tmp_path, folder)
    project.run()
    (warning,) = project.task.warnings
    assert "leave out its part for images" in warning


def test_files_and_figures_say_what_will_be_trained(project: Project) -> None:
    figures = project.run("data.validation_fraction=0.1")
    assert figures["train_rows"] + figures["validation_rows"] == 100
    assert 2 < figures["validation_rows"] < 20
    assert figures["test_rows"] == 0
    tokens = list(read_tokens(project.output / "train.tokens.arrow"))
    assert figures["train_tokens"] == sum(len(row["input_ids"]) for row in tokens)
    trained = sum(label != IGNORED for row in tokens for label in row["labels"])
    assert figures["train_tokens_trained"] == trained
    assert figures["train_share_trained"] == pytest.approx(trained / figures["train_tokens"], abs=1e-4)
    assert figures["train_longest"] == max(len(row["input_ids"]) for row in tokens)
    assert figures["train_length_percentiles"]["99"] <= figures["train_longest"]
    assert figures["train_end_of_turn"] == ["<|im_end|>"]
    assert figures["train_leading_bos"] == [0]
    summary = json.loads((project.output / "data.json").read_text(encoding="utf-8"))
    assert summary.items() >= figures.items()
    example = summary["train_examples"][0]
    assert example["trained"] == ["A number.<|im_end|>"]
    assert example["text"].startswith("<|im_start|>user\nWhat is ")
    assert (project.output / "test.jsonl").read_bytes() == b""
    assert project.task.warnings == []


def questions_of(rows: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


def test_the_split_depends_on_the_seed_and_the_question_alone(project: Project) -> None:
    def split(*overrides: str) -> tuple[list[str], list[str]]:
        project.run("data.validation_fraction=0.2", *overrides)
        return questions_of(project.rows("train")), questions_of(project.rows("validation"))

    first, again, other = split("train.seed=1"), split("train.seed=1"), split("train.seed=2")
    assert first == again
    assert first != other
    for train, validation in (first, other):
        assert sorted([*train, *validation]) == sorted(QUESTIONS)
        assert 8 < len(validation) < 32
    more = [f"Which is {number}?" for number in range(50)]
    write(project.folder / "train.jsonl", [conversation(question) for question in [*more, *reversed(QUESTIONS)]])
    train, validation = split("train.seed=1")
    assert set(train) >= set(first[0])  # new rows and another order move no row
    assert set(validation) >= set(first[1])
    assert any(question in validation for question in more)


@pytest.mark.parametrize(("rows", "fraction", "expected"), [(1, 0.5, 0), (2, 0.001, 1), (2, 0.99, 1), (9, 0, 0)])
def test_the_split_leaves_something_to_train(project: Project, rows: int, fraction: float, expected: int) -> None:
    write(project.folder / "train.jsonl", [conversation(question) for question in QUESTIONS[:rows]])
    figures = project.run(f"data.validation_fraction={fraction}")
    assert (figures["train_rows"], figures["validation_rows"]) == (rows - expected, expected)
    found = project.account("train")
    assert (found["rows"], found["kept"]) == (rows, rows)


def test_rows_of_one_group_stay_together(project: Project) -> None:
    rows = [conversation(question) | {"author": number // 10} for number, question in enumerate(QUESTIONS)]
    write(project.folder / "train.jsonl", rows)
    project.run("data.validation_fraction=0.3", "data.group=author")
    held_out = {QUESTIONS.index(question) // 10 for question in questions_of(project.rows("validation"))}
    trained = {QUESTIONS.index(question) // 10 for question in questions_of(project.rows("train"))}
    assert held_out
    assert not held_out & trained
    write(project.folder / "train.jsonl", [*rows, conversation("Whose?")])
    with pytest.raises(UserError, match=r'train\.jsonl:101: has no "author", which data\.group names'):
        project.run("data.group=author")
    write(project.folder / "train.jsonl", [conversation(question) | {"author": 1} for question in QUESTIONS])
    figures = project.run("data.group=author")
    assert (figures["train_rows"], figures["validation_rows"]) == (100, 0)


def test_given_sets_are_used_as_they_are(project: Project) -> None:
    write(project.folder / "v.jsonl", [conversation("How are you?")] * 2)
    write(project.folder / "t.jsonl", [conversation("Who are you?")])
    figures = project.run("data.validation=v.jsonl", "data.test=t.jsonl")
    assert (figures["train_rows"], figures["validation_rows"], figures["test_rows"]) == (100, 2, 1)
    assert project.rows("test") == [conversation("Who are you?")]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_what_only_python_takes_for_a_line_end_is_text_to_every_reader(project: Project, base: Path, kind: str) -> None:
    odd = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"
    rows = [conversation(f"{question}{odd}", odd) for question in QUESTIONS[:2]]
    questions = [row["messages"][:1] for row in rows]
    given = project.folder / f"odd.{kind}"
    if kind == "jsonl":
        write(given, rows)
    else:
        with given.open("w", encoding="utf-8", newline="") as file:
            contents = ([message["content"] for message in row["messages"]] for row in rows)
            csv.writer(file).writerows([["prompt", "completion"], *contents])
    project.run(*(f"data.{name}={given.name}" for name in ("train", "validation", "test")), name="data")
    artefacts = Artefacts(Verify(), base, None, {}, project.folder, run=project.folder)
    assert project.rows("train") == rows
    found = asked(project.output, None)
    assert [(question.messages, question.expected) for question in found] == [(turns, odd) for turns in questions]
    assert artefacts.questions == found
    known = trained_labels.KnownRows(artefacts.tokenizer, project.output / "train.jsonl")
    owners = [known.owner_of(row["input_ids"]) for row in read_tokens(project.output / "train.tokens.arrow")]
    assert [owner and owner.row.messages for owner in owners] == [row["messages"] for row in rows]
    assert len(list(read_held_out(Layout(project.folder))[1])) == 2

    answered = project.folder / "evaluate" / "base" / "answers.jsonl"
    answered.parent.mkdir(parents=True)
    write(answered, [{"answer": odd, "expected": odd, "correct": True}] * 2)
    assert answers.marks(answered) == [True, True]
    task = Task(evaluate.STAGE, project.config, project.folder, answered.parent.with_name("table"), evaluate.TABLE)
    task.output.mkdir()
    assert evaluate.main(task) == {"base": 1.0}


def test_a_question_that_cannot_be_asked_is_found_before_anything_is_trained(project: Project, base: Path) -> None:
    shutil.copytree(base, own := project.folder / "base")
    (own / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 200}', encoding="utf-8")
    write(project.folder / "t.jsonl", [conversation("Who are you?"), conversation("Who? " * 100)])
    with pytest.raises(UserError, match=r"t\.jsonl:2: the question has \d{3} tokens, .* made for 200 .*shorten it"):
        project.run("data.test=t.jsonl", f"model.base={own}", "train.max_length=200")
    template = own / "chat_template.jinja"
    template.write_text(
        "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}" + template.read_text()
    )
    turns = conversation("A?")["messages"] + conversation("B?")["messages"]
    write(project.folder / "t.jsonl", [conversation("Who are you?"), {"messages": turns}])
    with pytest.raises(UserError, match=r"t\.jsonl:2: .*too many"):
        project.run("data.test=t.jsonl", f"model.base={own}", "train.max_length=200")
    project.run("data.test=t.jsonl", f"model.base={own}", "train.max_length=200", "eval.limit=1")  # it is not asked


def test_a_context_that_does_not_hold_what_is_asked_is_said_before_training(project: Project, base: Path) -> None:
    """Ollama would cut a conversation that does not fit, without a word."""
    write(project.folder / "t.jsonl", [conversation("Who are you?"), conversation("Who? " * 40)])
    given = ("data.test=t.jsonl", "eval.max_new_tokens=30")
    figures = project.run(*given, "train.max_length=300")
    question = figures["test_longest_question"]
    assert question > 80 > figures["train_longest"]
    assert figures["context_needed"] == question + 30
    assert project.task.warnings == []
    num_ctx = "ollama.parameters.num_ctx"
    with pytest.raises(UserError, match=rf"t\.jsonl:2: the question has {question} tokens, and {num_ctx} holds 60 "):
        project.run(*given, f"{num_ctx}=60")
    project.run(*given, f"{num_ctx}={question + 29}")
    warning = project.task.warnings[0]
    assert f"holds {question + 29} tokens with the answer: one of more than 29 is cut" in warning
    assert "eval.max_new_tokens is 30" in warning
    project.run(*given, f"{num_ctx}={question + 30}")
    assert project.task.warnings == []

    shutil.copytree(base, own := project.folder / "base")
    (own / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 200}', encoding="utf-8")
    write(project.folder / "train.jsonl", [conversation("Why? " * 100)])
    project.run(f"model.base={own}", "train.max_length=600", "data.validation_fraction=0")
    warning = project.task.warnings[0]
    assert re.search(r"the longest row has \d{3} tokens, and the base was made for 200: .* leaves out", warning)


def test_questions_with_tools_are_left_out_and_that_is_said(project: Project) -> None:
    tool = {"type": "function", "function": {"name": "lamp", "parameters": {}}}
    plain, with_tools = conversation("Who are you?"), conversation("Light!") | {"tools": [tool]}
    write(project.folder / "t.jsonl", [with_tools, plain])
    project.run("data.test=t.jsonl")
    assert "t.jsonl: 1 of 2 rows have tools; they are not asked" in project.task.warnings
    (question,) = asked(project.output, None)
    assert (question.messages, question.expected, question.tools) == ([plain["messages"][0]], "A number.", None)
    assert question.place == f"{project.output}/test.jsonl:2"
    write(project.folder / "t.jsonl", [with_tools])
    with pytest.raises(UserError, match=r"data\.test: every row of .*t\.jsonl has tools"):
        project.run("data.test=t.jsonl")


@pytest.mark.parametrize("unread", [True, False])
def test_tools_that_would_not_be_served_are_refused(project: Project, unread: bool) -> None:
    """llama.cpp cannot read the template's first line, so that the served file has one without tools."""
    first = "{% set ignored = messages | selectattr('content', 'no_such_test') %}" if unread else ""
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}"
    asked = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (project.folder / "own.jinja").write_text(first + tools + turns + asked)
    chosen = f'model.chat_template="{project.folder / "own.jinja"}"'
    tool = {"type": "function", "function": {"name": "lamp", "description": "A lamp.", "parameters": {}}}
    rows = [conversation(question) for question in QUESTIONS]
    write(project.folder / "train.jsonl", rows)
    project.run(chosen)
    write(project.folder / "train.jsonl", [*rows, conversation("Light!") | {"tools": [tool]}])
    if unread:
        said = rf"train\.jsonl:{len(rows) + 1}: has tools\. llama\.cpp does not do .*unknown test.*tools are left out"
        with pytest.raises(UserError, match=said):
            project.run(chosen)
    else:
        project.run(chosen)


def test_duplicates_and_leaks_are_counted_and_said(project: Project) -> None:
    write(project.folder / "train.jsonl", [conversation(question) for question in [*QUESTIONS, *QUESTIONS[:7]]])
    write(project.folder / "t.jsonl", [conversation("What is 3 PLUS 4"), conversation("Who are you?")])
    figures = project.run("data.test=t.jsonl", "data.validation_fraction=0")
    assert (figures["duplicates_dropped"], figures["test_leaks"], figures["train_rows"]) == (7, 1, 100)
    repeats, leaks = project.task.warnings
    assert "train: 7 of 107 rows: a repetition of another row; " in repeats
    assert "train.jsonl:101: repeats " in repeats
    assert "1 test rows ask what a training row asks" in leaks
    assert "1 of them with the same answer" in leaks
    assert "t.jsonl:1" in leaks
    assert "train.jsonl:35" in leaks


def test_rows_that_are_too_long(project: Project) -> None:
    long = conversation("Why?", "Because. " * 200)
    write(project.folder / "train.jsonl", [conversation("What is 1 plus 1?"), long])
    with pytest.raises(UserError, match=r"train\.jsonl:2: has [\d,]+ tokens, train\.max_length is 256"):
        project.run("data.validation_fraction=0")
    figures = project.run("data.validation_fraction=0", "data.on_overlong=drop")
    assert (figures["train_rows"], figures["train_overlong_dropped"], len(project.rows("train"))) == (1, 1, 1)
    assert re.search(
        r"1 of 2 rows: too long and left out; .*train\.jsonl:2: has [\d,]+ tokens", project.task.warnings[0]
    )
    figures = project.run("data.validation_fraction=0", "data.on_overlong=truncate")
    assert (figures["train_rows"], figures["train_overlong_cut"], figures["train_longest"]) == (2, 1, 256)
    assert re.search(r"1 of 2 rows: too long and cut; .*train\.jsonl:2: has", project.task.warnings[0])
    write(project.folder / "train.jsonl", [long])
    with pytest.raises(UserError, match="no row is left to train on"):
        project.run("data.validation_fraction=0", "data.on_overlong=drop")


def test_messages_that_were_cut_are_said(project: Project) -> None:
    row = conversation("Hi")
    row["messages"].append({"role": "user", "content": "And?"})
    write(project.folder / "train.jsonl", [row])
    project.run("data.validation_fraction=0")
    assert project.rows("train") == [conversation("Hi")]
    assert "1 messages after a row's last trained answer" in project.task.warnings[0]


def test_a_template_that_refuses_names_the_row(project: Project, base: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(base, own)
    template = own / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template.write_text(refusal + template.read_text(encoding="utf-8"), encoding="utf-8")
    row = conversation("Hi")
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    write(project.folder / "train.jsonl", [conversation("a"), row])
    with pytest.raises(UserError, match=r"train\.jsonl:2: the model's chat template refuses .*: no system"):
        project.run(f"model.base={own}", "data.validation_fraction=0")


def test_json_metric_asks_for_json_answers(project: Project) -> None:
    write(project.folder / "t.jsonl", [conversation("Who are you?", "no JSON")])
    with pytest.raises(UserError, match=r't\.jsonl:1: eval\.metric is "json"'):
        project.run("data.test=t.jsonl", "eval.metric=json")


def test_the_same_bytes_every_time_and_in_any_batch_size(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.run(name="first")
    monkeypatch.setattr(data, "BATCH", 7)
    project.run(name="second")
    for path in (project.folder / "first").iterdir():
        assert path.read_bytes() == (project.folder / "second" / path.name).read_bytes(), path.name


def test_inputs_are_the_data_and_what_makes_tokens(project: Project, base: Path) -> None:
    config, _ = load_config(project.folder / "pipeline.toml")
    names = {path.name for path in data.STAGE.files(config, "")}
    assert names >= {"train.jsonl", "tokenizer.json", "chat_template.jinja"}
    assert "model.safetensors" not in names


CALL = {"id": "c1", "type": "function", "function": {"name": "lamp", "arguments": {"room": "hall"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "lamp",
        "description": "Switch a lamp.",
        "parameters": {"type": "object", "properties": {"room": {"type": "string", "description": "Where."}}},
    },
}
WITH_TOOLS = {
    "messages": [
        {"role": "user", "content": "Light!"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "It is on.", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Done."},
    ],
    "tools": [TOOL],
}
# What each part of a conversation is lost to: a template that writes everything but this.
WRITES_ALL = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' ~ m.name if m.name else '' }}\n"
    "{{ '<think>' ~ m.reasoning_content ~ '</think>' if m.reasoning_content else '' }}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMED = {"messages": [{"role": "user", "name": "Ann", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
REASONED = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "A greeting."},
    ]
}
SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, *NAMED["messages"]]}


@pytest.mark.parametrize(
    ("row", "lost", "found"),
    [
        (WITH_TOOLS, "tools", "nothing of the tool 'lamp'"),
        (WITH_TOOLS, "m.tool_calls", "nothing of the call of 'lamp' in message 2"),
        (WITH_TOOLS, "m.content if m.role == 'tool'", "nothing of the text of message 3"),
        (REASONED, "m.reasoning_content", "nothing of the reasoning of message 2"),
        (NAMED, "m.name", "nothing of the name 'Ann' of message 1"),
        (SYSTEM, "m.content if m.role == 'system'", "nothing of the text of message 1"),
    ],
)
def test_what_the_template_leaves_out_is_named(
    project: Project, base: Path, row: dict[str, Any], lost: str, found: str
) -> None:
    shutil.copytree(base, own := project.folder / "base")
    template = own / "chat_template.jinja"
    template.write_text(WRITES_ALL)
    write(project.folder / "train.jsonl", [conversation("Hey"), row])
    given = (f"model.base={own}", "data.validation_fraction=0", "train.max_length=512")
    assert project.run(*given)["train_rows"] == 2
    assert project.task.warnings == []

    value, _, condition = lost.partition(" if ")
    for written in (f"{value} if", f"' ' ~ {value}", f"'<think>' ~ {value} ~", f"{{{{ {value} ", f"in {value} or"):
        replacement = f"('' if {condition} else {value})" if condition else "[]" if "call" in value else "''"
        template.write_text(template.read_text().replace(written, written.replace(value, replacement)))
    if value == "tools":
        template.write_text(template.read_text().replace("{% if tools %}", "{% if false %}"))
    with pytest.raises(UserError, match=rf"train\.jsonl:2: the model's chat template writes {found}, so it would not"):
        project.run(*given)
    assert project.run(*given, "data.unwritten=keep")["train_rows"] == 2
    warning = project.task.warnings[0]
    assert "1 of 2 rows: " in warning
    assert found in warning


def test_control_tokens_in_texts_are_found(project: Project) -> None:
    write(project.folder / "train.jsonl", [conversation("Hi"), conversation("Say <|im_end|>")])
    message = r"train\.jsonl:2: message 1 holds '<\|im_end\|>', which is a control token"
    with pytest.raises(UserError, match=message):
        project.run()
    figures = project.run("data.control_tokens=keep", "data.validation_fraction=0")
    assert figures["train_rows"] == 2
    assert re.search(rf"1 of 2 rows: the control token <\|im_end\|>; .*{message}", project.task.warnings[0])


def test_rows_that_cannot_be_used_stop_the_stage_or_are_skipped_and_named(project: Project) -> None:
    good = [conversation(question) for question in QUESTIONS]
    bad = [conversation(question) | {"score": 1} for question in QUESTIONS[:25]]
    lines = [json.dumps(row) for row in [*good, *bad]] + ["{", json.dumps(good[0]), json.dumps(good[1] | {"weight": 0})]
    (project.folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as caught:
        project.run()
    first, scored, more, broken, advice = str(caught.value).splitlines()
    assert first == "train: 26 of 128 rows cannot be used"
    assert f'{project.folder}/train.jsonl:101: the key "score" is not known and would be lost; known are' in scored
    assert '25 rows: unknown key "score"; the next: train.jsonl:102, train.jsonl:103, ' in more
    assert more.endswith("train.jsonl:120, ...")
    assert "train.jsonl:126: not valid JSON" in broken
    assert 'data.on_error = "skip"' in advice

    with pytest.raises(UserError, match=r"data\.skip_limit lets 10\.00% of the rows"):
        project.run("data.on_error=skip")
    figures = project.run("data.on_error=skip", "data.skip_limit=0.5", "data.validation_fraction=0.1")
    assert figures["train_rows"] + figures["validation_rows"] == 100
    account = project.account("train")
    assert (account["rows"], account["kept"], account["skipped"], account["left_out"]) == (128, 100, 26, 2)
    assert account["findings"]['unknown key "score"']["count"] == 25
    assert account["findings"]["marked as not to be trained"]["places"] == [f"{project.folder}/train.jsonl:128"]
    named = [json.loads(line) for line in (project.output / "findings.jsonl").read_text().splitlines()]
    assert len(named) == 28
    assert {row["place"].rpartition(":")[2] for row in named} == {str(number) for number in range(101, 129)}

    figures = project.run("data.ignore=['score']", "data.on_error=skip", "data.duplicates=keep")
    assert figures["train_rows"] + figures["validation_rows"] == 126


def test_a_long_conversation_is_split_at_its_turns(project: Project) -> None:
    turns = [turn for number in range(30) for turn in conversation(f"And {number}?", f"Then {number + 1}.")["messages"]]
    system = {"role": "system", "content": "Count."}
    long = {"messages": [system, *turns]}
    long["messages"][2] = long["messages"][2] | {"weight": 0}
    write(project.folder / "train.jsonl", [conversation("Hi"), long])
    figures = project.run("data.on_overlong=split", "data.validation_fraction=0", "train.max_length=100")
    assert figures["train_longest"] <= 100
    pieces = project.rows("train")[1:]
    assert 2 < len(pieces) < 30
    assert all(piece["messages"][0] == system for piece in pieces)
    assert [turn for piece in pieces for turn in piece["messages"][1:]] == turns
    assert project.account("train")["kept"] == 2
    assert f"1 of 2 rows: too long and split; {project.folder}/train.jsonl:2: is" in project.task.warnings[0]
    assert pieces[0]["trained"] == list(range(4, len(pieces[0]["messages"]), 2))
    with pytest.raises(UserError, match=r"train\.jsonl:2: has \d+ tokens in one question and its answer"):
        project.run("data.on_overlong=split", "data.validation_fraction=0", "train.max_length=35")


def test_marked_turns_are_not_trained_and_verify_knows_it(project: Project, base: Path) -> None:
    turns = conversation("One?", "1")["messages"] + conversation("Two?", "2")["messages"]
    masked = [turns[0], turns[1] | {"weight": 0}, *turns[2:]]
    write(project.folder / "train.jsonl", [{"messages": masked}])
    project.run("data.validation_fraction=0", name="data")
    (row,) = read_tokens(project.output / "train.tokens.arrow")
    artefacts = Artefacts(Verify(), base, None, {}, project.folder, run=project.folder)
    tokenizer = artefacts.tokenizer
    known = trained_labels.KnownRows(tokenizer, project.output / "train.jsonl")
    summary = json.loads((project.output / "data.json").read_text())
    assert summary["train_examples"][0]["trained"] == ["2<|im_end|>"]

    def faults(labels: list[int]) -> trained_labels.Faults:
        found = trained_labels.Faults()
        owner = known.owner_of(row["input_ids"])
        trained_labels.judge_row(tokenizer, row["input_ids"], labels, owner, "", found, None)
        return found

    assert faults(row["labels"]) == trained_labels.Faults()
    everything = [*row["input_ids"][:-1], IGNORED]
    assert faults(everything) != trained_labels.Faults()
    write(project.folder / "train.jsonl", [{"messages": turns}])
    project.run("data.validation_fraction=0", "data.train_on=all", name="data")
    (row,) = read_tokens(project.output / "train.tokens.arrow")
    assert row["labels"] == everything
    known = trained_labels.KnownRows(tokenizer, project.output / "train.jsonl")
    assert faults(row["labels"]) == trained_labels.Faults()
    assert faults([IGNORED, *row["labels"][1:]]) != trained_labels.Faults()
    assert faults([*row["labels"][:-4], *[IGNORED] * 4]) != trained_labels.Faults()


def test_near_duplicates_and_contradictions_are_said_with_their_places(project: Project) -> None:
    words = " ".join(f"word{number}" for number in range(120))
    rows = [conversation(words), conversation(words.upper() + "!"), conversation("Why?"), conversation("Why?", "So.")]
    write(project.folder / "train.jsonl", rows)
    figures = project.run("data.validation_fraction=0", "train.max_length=2000")
    assert (figures["near_duplicates"], figures["contradictions"], figures["train_rows"]) == (1, 1, 4)
    place = f"{project.folder}/train.jsonl"
    said = "\n".join(project.task.warnings)
    assert f"a near duplicate of another row; {place}:2: is nearly {place}:1 (about 100% of the word pairs)" in said
    assert f"another answer to the same question; {place}:4: answers the question of {place}:3 otherwise" in said

    figures = project.run("data.validation_fraction=0", "train.max_length=2000", "data.duplicates=near")
    assert (figures["near_duplicates_dropped"], figures["near_duplicates"], figures["train_rows"]) == (1, 0, 3)
    account = project.account("train")
    assert (account["rows"], account["left_out"]) == (4, 1)
    assert account["findings"]["a near duplicate of another row, left out"]["places"] == [f"{place}:2"]


def test_near_duplicates_on_both_sides_of_the_split_are_leaks(project: Project) -> None:
    rows = []
    for number in range(40):
        words = [f"word{number}x{at}" for at in range(160)]
        rows += [conversation(" ".join(words)), conversation(" ".join([*words, "more"]))]
    write(project.folder / "train.jsonl", rows)
    figures = project.run("data.validation_fraction=0.5", "train.max_length=2000")
    held_out = set(questions_of(project.rows("validation")))
    questions = questions_of(rows)
    apart = [first for first in range(0, 80, 2) if (questions[first] in held_out) != (questions[first + 1] in held_out)]
    assert 5 < len(apart) < 35
    found = project.account("train")["findings"]["a near duplicate of a row on the other side of the split"]
    assert figures["validation_leaks"] == found["count"] <= len(apart)
    assert found["count"] >= len(apart) - 2  # an estimate may miss some
    lines = {int(place.rpartition(":")[2]) for place in found["places"]}
    assert lines <= {first + 2 for first in apart}


def test_further_sources_have_a_weight_a_limit_and_a_system_message(project: Project) -> None:
    for name in ("half", "twice", "few"):
        write(project.folder / f"{name}.jsonl", [conversation(f"{name} {question}") for question in QUESTIONS])
    with (project.folder / "pipeline.toml").open("a") as file:
        file.write(
            "[[data.sources]]\npath = 'half.jsonl'\nweight = 0.5\nsystem = 'Half.'\n"
            "[[data.sources]]\npath = 'twice.jsonl'\nweight = 2\n[[data.sources]]\npath = 'few.jsonl'\nlimit = 7\n"
        )
    figures = project.run("data.validation_fraction=0", "data.system=Be brief.")
    account = project.account("train")
    half = account["left_out"]
    assert 30 < half < 70
    assert account["findings"]["left out by the weight of its source"]["count"] == half
    assert (account["rows"], account["kept"]) == (307, 307 - half)
    assert figures["train_rows"] == 100 + (100 - half) + 200 + 7
    systems = [row["messages"][0]["content"] for row in project.rows("train")]
    assert (systems.count("Half."), systems.count("Be brief.")) == (100 - half, 307)
    sources = json.loads((project.output / "data.json").read_text())["train_sources"]
    assert {Path(name).name: of["sequences"] for name, of in sources.items()} == {
        "train.jsonl": 100, "half.jsonl": 100 - half, "twice.jsonl": 200, "few.jsonl": 7,
    }  # fmt: skip
    project.run("data.validation_fraction=0.2")
    held_out = [json.dumps(row) for row in project.rows("validation")]
    assert len(set(held_out)) == len(held_out)
    names = {path.name for path in data.STAGE.files(project.config, "")}
    assert names >= {"half.jsonl", "twice.jsonl", "few.jsonl"}
    (project.folder / "few.jsonl").unlink()
    with pytest.raises(UserError, match=r"data\.sources: .*few\.jsonl: no such file"):
        project.run()


TEXTS = [f"{question} It is a sum of two numbers, and nobody knows it better." for question in QUESTIONS]


def test_whole_texts_are_trained_to_their_end_and_verify_knows_it(project: Project, base: Path) -> None:
    write(project.folder / "train.jsonl", [{"text": text} for text in TEXTS])
    figures = project.run("data.validation_fraction=0.1", "data.window=16", name="data")
    assert (figures["train_texts"], figures["train_texts"] + figures["validation_texts"]) == (
        figures["train_rows"],
        100,
    )
    assert (figures["train_longest"], figures["train_end_of_turn"]) == (16, ["<|im_end|>"])
    assert figures["train_sequences"] > 2 * figures["train_rows"]
    warning = project.task.warnings[0]
    assert "the model is served with the base's own chat template, which no row was trained with" in warning
    assert 'data.format = "text"' in warning
    assert asked(project.output, None) == []
    artefacts = Artefacts(Verify(), base, None, {}, project.folder, run=project.folder, adapter=base)
    tokenizer = artefacts.tokenizer
    assert artefacts.questions == []
    assert trained_end_of_turn(artefacts) == tokenizer.eos_token_id
    rows = list(read_tokens(project.output / "train.tokens.arrow"))
    texts = [row["text"] for row in project.rows("train")]
    trained = [label for row in rows for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(trained) == "".join(f"{text}<|im_end|>" for text in texts)

    batches = project.folder / "train" / "batches.jsonl"
    batches.parent.mkdir()
    artefacts.config = Task(verify.STAGE, project.config, project.folder, project.output).config  # what it may read

    def failures(change: Callable[[dict[str, Any]], None]) -> set[str]:
        changed = copy.deepcopy(rows)
        for row in changed:
            change(row)
        batch = {name: [row[name] for row in changed] for name in ("input_ids", "labels")}
        write(batches, [{"step": 0} | batch])
        return {result.id for result in trained_labels.check(artefacts) if result.verdict == FAIL}

    def mask_an_inner_token(row: dict[str, Any]) -> None:
        row["labels"][5] = IGNORED

    def mask_the_end(row: dict[str, Any]) -> None:
        row["labels"][-1] = IGNORED

    def train_twice(row: dict[str, Any]) -> None:
        row["labels"] = row["input_ids"]

    def cut(row: dict[str, Any]) -> None:
        row["input_ids"], row["labels"] = row["input_ids"][:9], row["labels"][:9]

    def other(row: dict[str, Any]) -> None:
        row["input_ids"][3] = 7

    assert failures(lambda row: None) == set()
    assert failures(mask_an_inner_token) == {"labels.spans"}
    assert failures(mask_the_end) == {"labels.spans", "labels.end_of_turn"}
    assert failures(train_twice) == {"labels.spans"}
    assert failures(cut) >= {"labels.cut"}
    assert failures(other) >= {"labels.known"}


def test_a_model_of_whole_texts_goes_on_with_what_it_is_sent(project: Project) -> None:
    write(project.folder / "train.jsonl", [{"story": text} for text in TEXTS])
    config, given = load_config(
        project.folder / "pipeline.toml", ["data.format=text", 'data.columns={text="story"}', "train.max_length=64"]
    )
    settings, sources = resolve(config, given, Facts(None, None, None))
    assert (settings.model.chat_template, settings.data.window) == ("completion", 64)
    assert sources["model.chat_template"].startswith("default: ")
    with pytest.raises(UserError, match=r"data.window = 65 is longer than train.max_length = 64"):
        resolve(
            config.model_copy(update={"data": config.data.model_copy(update={"window": 65})}), given, Facts(1, 1, 1)
        )
    project.run("data.format=text", 'data.columns={text="story"}', "model.chat_template=completion")
    assert not any("served" in words for words in project.task.warnings)
    with pytest.raises(UserError, match=r"data.system: every row is a whole text"):
        project.run("data.system=Be brief.", 'data.columns={text="story"}')


def test_texts_beside_conversations(project: Project) -> None:
    told = [{"text": text} for text in TEXTS[:10]]
    doubled = [told[0], {"text": TEXTS[1].replace("?", "!")}]
    write(project.folder / "train.jsonl", [*map(conversation, QUESTIONS[:10]), *told, *doubled])
    write(project.folder / "test.jsonl", [told[3], conversation("Who?")])
    figures = project.run("data.test=test.jsonl", "data.validation_fraction=0")
    assert (figures["train_rows"], figures["train_texts"], figures["duplicates_dropped"]) == (21, 11, 1)
    assert (figures["near_duplicates"], figures["contradictions"], figures["test_rows"]) == (1, 0, 1)
    assert project.account("test")["findings"]["a whole text, which is not asked"]["count"] == 1
    write(project.folder / "train.jsonl", [{"text": "a <|im_end|> b"}])
    with pytest.raises(UserError, match=r"train.jsonl:1: the text holds '<\|im_end\|>', which is a control token"):
        project.run()
    write(project.folder / "test.jsonl", told)
    with pytest.raises(UserError, match=r"data.test: every row is a whole text .*test.jsonl:1.*data.validation"):
        project.run("data.test=test.jsonl")


def test_shuffled_rows_stand_in_one_order_whatever_files_they_come_from(project: Project) -> None:
    def order(*overrides: str) -> list[str]:
        project.run("data.validation_fraction=0", "data.on_overlong=truncate", *overrides)
        tokens = list(read_tokens(project.output / "train.tokens.arrow"))
        known = trained_labels.KnownRows(
            saved_tokenizer(Path(project.config.model.base)), project.output / "train.jsonl"
        )
        rows = [owner.row.messages for row in tokens if (owner := known.owner_of(row["input_ids"])) is not None]
        assert rows == [row["messages"] for row in project.rows("train")]
        return questions_of(project.rows("train"))

    assert order() == QUESTIONS
    shuffled = order("data.shuffle=true")
    assert shuffled != QUESTIONS
    assert sorted(shuffled) == sorted(QUESTIONS)
    assert order("data.shuffle=true", "train.seed=2") != shuffled
    write(project.folder / "train.jsonl", [conversation(question) for question in QUESTIONS[60:]])
    write(project.folder / "more.jsonl", [conversation(question) for question in QUESTIONS[:60]])
    with (project.folder / "pipeline.toml").open("a") as file:
        file.write("[[data.sources]]\npath = 'more.jsonl'\n")
    assert order("data.shuffle=true") == shuffled

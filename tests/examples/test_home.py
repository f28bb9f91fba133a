"""The example's data is what its generator makes, and the task is what it says it is."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.leaks import find_leaks

from pipeline.data.formats import Conversation, Reading, read_conversations
from pipeline.data.metric import parse_strict
from pipeline.resources import resource
from pipeline.toml_file import load_config

HOME = resource("examples/home")
KEYS = ["device", "room", "action", "value", "time"]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    specification = importlib.util.spec_from_file_location("home_generate", HOME / "generate.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def examples(generator: ModuleType) -> dict[str, list[Any]]:
    return generator.build()


@pytest.fixture(scope="module")
def sets() -> dict[str, list[Conversation]]:
    return {
        name: read_conversations(HOME / f"{name}.jsonl", Reading("messages"))
        for name in ("train", "validation", "test")
    }


def test_the_committed_data_is_what_the_generator_writes(generator: ModuleType, tmp_path: Path) -> None:
    generator.main(tmp_path)
    for name in ("train", "validation", "test"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (HOME / f"{name}.jsonl").read_bytes()


def test_sizes_and_distinct_rows(sets: dict[str, list[Conversation]]) -> None:
    questions = {name: {row.messages[0]["content"].lower() for row in rows} for name, rows in sets.items()}
    assert len(questions["train"]) == len(sets["train"]) >= 1500
    assert len(questions["validation"]) == len(sets["validation"]) == 200
    assert len(questions["test"]) == len(sets["test"]) == 300
    assert not questions["test"] & (questions["train"] | questions["validation"])
    assert not questions["validation"] & questions["train"]


def test_no_combination_of_a_test_row_is_trained(examples: dict[str, list[Any]]) -> None:
    combinations = {name: {example.combination for example in rows} for name, rows in examples.items()}
    assert not combinations["test"] & combinations["train"]
    assert not combinations["validation"] & combinations["train"]
    assert not combinations["test"] & combinations["validation"]


def test_nothing_leaks(sets: dict[str, list[Conversation]]) -> None:
    assert find_leaks(sets["train"], sets["test"]) == []
    assert find_leaks(sets["train"], sets["validation"]) == []


def test_answers_are_compact_strict_json_and_copy_what_was_said(
    generator: ModuleType, sets: dict[str, list[Conversation]]
) -> None:
    actions = {intent.action for intent in generator.INTENTS}
    for row in (row for rows in sets.values() for row in rows):
        question, text = (message["content"] for message in row.messages)
        answer = parse_strict(text)
        assert json.dumps(json.loads(text), separators=(",", ":")) == text
        if answer == generator.REFUSAL:
            continue
        assert list(answer) == KEYS
        assert answer["device"] in generator.DEVICES
        assert answer["action"] in actions
        assert any(name in question for name in generator.DEVICES[answer["device"]])
        for key in ("room", "value", "time"):
            assert answer[key] is None or answer[key] in question, (key, question)


def test_the_answer_follows_from_the_question(generator: ModuleType, examples: dict[str, list[Any]]) -> None:
    """No two rows say the same and want different answers, also across intents."""
    wanted: dict[str, Any] = {}
    for example in (example for rows in examples.values() for example in rows):
        assert wanted.setdefault(example.text.lower().rstrip(".?"), example.answer) == example.answer


def test_every_room_device_and_action_is_trained_and_refusals_are_varied(
    generator: ModuleType, examples: dict[str, list[Any]]
) -> None:
    answers = [example.answer for example in examples["train"]]
    assert {answer.get("room") for answer in answers} == {None, *generator.ROOMS}
    assert {answer["device"] for answer in answers if "device" in answer} == set(generator.DEVICES)
    assert {answer["action"] for answer in answers if "action" in answer} == {i.action for i in generator.INTENTS}
    for rows in examples.values():
        refused = [example for example in rows if example.answer == generator.REFUSAL]
        assert 0.08 * len(rows) < len(refused) < 0.25 * len(rows)


def test_its_configuration_is_valid() -> None:
    config, given = load_config(HOME / "pipeline.toml")
    assert config.eval.metric == "json"
    assert config.model.base == "smollm2-135m-instruct"
    assert all(path is not None and path.is_file() for path in (config.data.train, config.data.test))
    assert "train.learning_rate" in given

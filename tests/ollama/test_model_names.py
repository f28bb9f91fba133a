"""Names that Ollama takes, and those that lead to another model or another prompt."""

import pytest
from support import servers

from pipeline.errors import UserError
from pipeline.ollama.model_names import check_name


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("home", "home:latest"),
        ("home:q4_k_m", "home:q4_k_m"),
        ("me/home", "me/home:latest"),
        ("host.example:5000/me/home:1", "host.example:5000/me/home:1"),
        ("Qwen2.5-7B_x", "Qwen2.5-7B_x:latest"),
        ("a" * 80, "a" * 80 + ":latest"),
    ],
)
def test_names_that_ollama_takes(given: str, meant: str) -> None:
    assert check_name(given) == meant
    servers.client().create(meant, {"from": _scratch(), "system": given})
    assert meant in servers.client().names()
    servers.client().delete(meant)


def _scratch() -> str:
    servers.engine()
    return "scratch-go:latest"


@pytest.mark.parametrize(
    "given",
    [
        "", " ", "a b", "a/b/c/d", "-a", ".a", "a:", ":a", "a:b:c", "a//b", "/a", "a/", "../a", "a/../b", "a\nb",
        "a\nSYSTEM b", "é", "a" * 81, "a:" + "b" * 81, "a@sha256:1", "a;b", "$(a)", "`a`", "a\\b", "a.b/c", "a\0b",
        "host:1/a", "a:latest ",
    ],
)  # fmt: skip
def test_names_that_ollama_would_not_take(given: str) -> None:
    with pytest.raises(UserError, match="not a name"):
        check_name(given)


@pytest.mark.parametrize("given", ["deepseek-r1", "me/deepseek-r1:8b", "DeepSeek-R1"])
def test_a_name_that_changes_the_prompt(given: str) -> None:
    with pytest.raises(UserError, match="drops the thinking"):
        check_name(given)
    assert check_name(f"home-{given.rpartition('/')[2]}")


@pytest.mark.parametrize("tag", ["local", "cloud", "Cloud", "LOCAL", "x-cloud", "q4_k_m-Cloud"])
def test_a_tag_that_leads_to_another_model(tag: str) -> None:
    with pytest.raises(UserError, match=f"takes the tag '{tag}' for where a model runs"):
        check_name(f"host.example:5000/me/home:{tag}")
    assert check_name(f"{tag}/home-{tag}:{tag}2") == f"{tag}/home-{tag}:{tag}2"

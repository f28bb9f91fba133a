"""Whether an Ollama is new enough."""

import pytest

from pipeline.setup.ollama_version import new_enough


@pytest.mark.parametrize(
    ("version", "enough"),
    [
        ("0.34.0", True),
        ("0.32.0", True),
        ("1.0", True),
        ("0.31.9", False),
        ("0.9.6", False),
        ("0.0.0", False),
        ("0.32.0-rc1-3-gabc", True),
        ("main", False),
    ],
)
def test_versions_are_compared_as_numbers(version: str, enough: bool) -> None:
    assert new_enough(version) is enough

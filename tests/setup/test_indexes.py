"""What uv and pip are told of the machine's configuration: where packages come from, and nothing else."""

import os
from pathlib import Path

import pytest

from pipeline.setup.indexes import pip_environment, uv_environment


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty configuration of the user's and the machine's: a folder for uv's file, and no variables."""
    for name in list(os.environ):
        if name.startswith(("UV_", "PIP_")) or name.upper().endswith("_PROXY") or name == "SSL_CERT_FILE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "shared"))
    (tmp_path / "uv").mkdir()
    (tmp_path / "shared" / "uv").mkdir(parents=True)
    return tmp_path / "uv" / "uv.toml"


def told() -> dict[str, str | None]:
    return uv_environment()


def test_nothing_is_told_where_nothing_is_configured(config: Path) -> None:
    assert told() == {"UV_NO_CONFIG": "1"}


def test_what_pip_was_told(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = tmp_path / "pip.conf"
    pip.write_text(
        "[global]\nindex-url = https://mirror.example/simple\nextra-index-url =\n    https://a.example\n"
        "    https://b.example\ntrusted-host = mirror.example\nproxy = http://proxy.example:3128\ncert = /ca.pem\n"
        "[install]\nfind-links = /wheels /more\nconstraint = /constraints.txt\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(pip))
    assert told() == {
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://a.example https://b.example",
        "UV_INSECURE_HOST": "mirror.example",
        "ALL_PROXY": "http://proxy.example:3128",
        "SSL_CERT_FILE": "/ca.pem",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_NO_CONFIG": "1",
    }
    # What was told to uv itself wins, under either of an index's two names.
    monkeypatch.setenv("UV_INDEX_URL", "https://own.example")
    assert "UV_DEFAULT_INDEX" not in told()


def test_of_pips_own_configuration_only_where_from_and_how_is_left(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = tmp_path / "pip.conf"
    pip.write_text(
        "[global]\nindex-url = https://mirror.example/simple\ntarget = /elsewhere\nno-index = True\n"
        "[install]\ndry-run = true\nuser = true\nfind-links =\n    /wheels\n    /more\n"
        "[download]\ntimeout = 90\nplatform = any\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(pip))
    monkeypatch.setenv("PIP_INDEX_URL", "https://nearer.example/simple")
    monkeypatch.setenv("PIP_DRY_RUN", "1")
    found = pip_environment()
    expected = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DRY_RUN": None,
        "PIP_INDEX_URL": "https://nearer.example/simple",  # a variable wins over a file, as with pip
        "PIP_NO_INDEX": "True",
        "PIP_FIND_LINKS": "/wheels /more",
        "PIP_TIMEOUT": "90",
    }
    assert expected.items() <= found.items()  # this machine's own files may name a certificate
    assert not found.keys() & {"PIP_TARGET", "PIP_USER", "PIP_PLATFORM"}
    assert told()["UV_DEFAULT_INDEX"] == "https://nearer.example/simple"
    assert told()["UV_NO_INDEX"] == "1"


def test_what_uv_was_told_in_its_files(config: Path, tmp_path: Path) -> None:
    (tmp_path / "shared" / "uv" / "uv.toml").write_text('index-url = "https://shared.example"\nnative-tls = true\n')
    config.write_text(
        'override-dependencies = ["one"]\nallow-insecure-host = ["a.example", "b.example"]\nresolution = "lowest"\n'
        '[[index]]\nname = "first"\nurl = "https://first.example"\n'
        '[[index]]\nurl = "https://main.example"\ndefault = true\n'
        '[[index]]\nname = "only-torch"\nurl = "https://torch.example"\nexplicit = true\n'
        '[pip]\nfind-links = ["/wheels"]\n'
    )
    assert told() == {
        "UV_INDEX": "first=https://first.example",
        "UV_DEFAULT_INDEX": "https://main.example",
        "UV_SYSTEM_CERTS": "1",
        "UV_INSECURE_HOST": "a.example b.example",
        "UV_FIND_LINKS": "/wheels",
        "UV_NO_CONFIG": "1",
    }


def test_file_that_is_no_toml_counts_for_nothing(config: Path) -> None:
    config.write_text("no [toml")
    assert told() == {"UV_NO_CONFIG": "1"}


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("UV_DEFAULT_INDEX", True),
        ("UV_INDEX_MIRROR_PASSWORD", True),
        ("UV_HTTP_TIMEOUT", True),
        ("UV_CACHE_DIR", True),
        ("UV_OFFLINE", True),
        ("UV_CONSTRAINT", False),
        ("UV_OVERRIDE", False),
        ("UV_EXCLUDE_NEWER", False),
        ("UV_PRERELEASE", False),
        ("UV_TORCH_BACKEND", False),
        ("UV_NO_VERIFY_HASHES", False),
        ("UV_SYSTEM_PYTHON", False),
    ],
)
def test_variables_that_say_where_from_stay_and_others_go(
    config: Path, monkeypatch: pytest.MonkeyPatch, name: str, kept: bool
) -> None:
    monkeypatch.setenv(name, "1")
    assert (name in told() and told()[name] is None) is not kept

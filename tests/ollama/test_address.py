"""Addresses as Ollama reads them, with the path of a proxy; passwords come from one place and are shown nowhere."""

import pytest

from pipeline.errors import UserError
from pipeline.ollama.address import credentials, given_host, normal_host, usual_host, without_password


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("127.0.0.1", "http://127.0.0.1:11434"),
        ("localhost:8080", "http://localhost:8080"),
        ("http://host", "http://host:80"),
        ("https://host/", "https://host:443"),
        ("0.0.0.0:11434", "http://127.0.0.1:11434"),
        ("[::1]:11434", "http://[::1]:11434"),
        ("::1", "http://[::1]:11434"),
        ("https://::1/ollama", "https://[::1]:443/ollama"),
        ("[::]:8080", "http://[::1]:8080"),
        (":11435", "http://127.0.0.1:11435"),
        ('"127.0.0.1:8080"', "http://127.0.0.1:8080"),
        ("host/ollama", "http://host:11434/ollama"),
        ("https://host/a/b/", "https://host:443/a/b"),
    ],
)
def test_addresses_are_read_as_ollama_reads_them(given: str, meant: str) -> None:
    assert normal_host(given) == meant


@pytest.mark.parametrize(
    "given",
    [
        "",
        "  ",
        "ftp://host",
        "http://",
        "host:99999",
        "host:port",
        "://",
        "a b",
        "a\tb",
        "a!b",
        "a..b",
        "[a:b]",
        "::1:11434",
        "host/a?b",
        "host/#a",
        "host/a b",
        "host/é",
    ],
)
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="not an address"):
        normal_host(given)


@pytest.mark.parametrize("given", ["http://me:hush@host", "me:hush@host/ollama", "https://me:hush@host:1", "hush@host"])
def test_a_password_is_refused_where_it_would_be_written_down(given: str) -> None:
    with pytest.raises(UserError, match="set the variable OLLAMA_HOST") as error:
        normal_host(given)
    assert "***@host" in str(error.value)
    assert "hush" not in str(error.value)


def test_a_password_of_the_variable_is_used_for_its_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "http://me:a%40b%2Fc@host:8080/ollama/")
    assert usual_host() == "http://host:8080/ollama"
    assert credentials("http://host:8080/ollama") == ("me", "a@b/c")
    assert credentials("http://host:8080") is None
    assert given_host() == "http://***@host:8080/ollama/"
    monkeypatch.setenv("OLLAMA_HOST", "http://host:8080/ollama")
    assert credentials("http://host:8080/ollama") is None
    monkeypatch.delenv("OLLAMA_HOST")
    assert usual_host() == "http://127.0.0.1:11434"


def test_no_password_is_shown_whatever_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "http://me:hu/sh@host")  # a / has to be written %2F
    with pytest.raises(UserError, match="not an address") as error:
        usual_host()
    assert "sh@" not in str(error.value)
    option = '--set ollama.host="http://me:hu=sh@host/a"'
    assert without_password(option) == '--set ollama.host="http://***@host/a"'
    assert without_password("pipeline.toml:3") == "pipeline.toml:3"

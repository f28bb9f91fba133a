"""Where a run is deployed to: which server, under which names, and whether they are free."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.ollama.client import Client, check_name, normal_host
from pipeline.ollama.server import DEFAULT_HOST, OllamaServer, find_ollama

STORE = "ollama"  # folder in the run: the models of a server of our own


def names_of(name: str | None, types: Sequence[str]) -> dict[str, str]:
    """The model's name in Ollama for each type: the first has the configured one, the others their type as the tag.

    Raises:
        UserError: Ollama would not take the name.
    """
    first = check_name(name or "model")
    model, _, tag = first.rpartition(":")
    stem = f"{model}:" if tag == "latest" else f"{first}-"
    return {kind: first if number == 0 else check_name(f"{stem}{kind}") for number, kind in enumerate(types)}


@contextmanager
def server(host: str | None, store: Path, log: Path) -> Iterator[tuple[Client, bool, Path | None] | str]:
    """An Ollama to deploy to: the configured one, else a running one, else one of our own that is stopped at the end.

    Args:
        host: the configured address.
        store: the models of a server of our own.
        log: its log.

    Yields:
        The client, whether the server is our own, and its log; or, if there is no Ollama, why.
    """
    if host:
        with Client(host) as client:
            yield client, False, None
        return
    reason = "no Ollama is running and none is installed"
    try:
        running = Client(normal_host(os.environ.get("OLLAMA_HOST") or DEFAULT_HOST))
    except UserError as error:
        if "too old" in str(error):
            reason = str(error)
    else:
        with running:
            yield running, False, None
        return
    program = find_ollama()
    if program is None:
        yield reason
        return
    with OllamaServer(store, program=program, log=log) as own, Client(own.host) as client:
        yield client, True, own.log


def refuse_taken(client: Client, name: str, deployed: Path, *, replace: bool) -> None:
    """A model of this name that another made is not replaced unless that is asked for.

    Args:
        client: the server.
        name: the name with its tag.
        deployed: what an earlier deployment of this run left.
        replace: it is asked for.

    Raises:
        UserError: the name is taken.
    """
    digest = client.names().get(name)
    before: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # nothing was deployed from this run yet
        before = json.loads((deployed / "deploy.json").read_text(encoding="utf-8"))
    ours = [model["digest"] for model in before.get("models", ()) if model["name"] == name]
    if digest is not None and digest not in ours and not replace:
        raise UserError(
            f"ollama.name: a model {name!r} is at {client.host} already, and this run did not make it; choose "
            "another name, or replace it with ollama.replace = true (`pipeline deploy --replace`)"
        )

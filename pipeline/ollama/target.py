"""Where a run is deployed to: which server, under which names, and whether they are free."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import console
from pipeline.errors import UserError
from pipeline.ollama.address import given_host, usual_host
from pipeline.ollama.client import Client
from pipeline.ollama.model_names import canonical, check_name
from pipeline.ollama.ollama_server import OllamaServer, find_ollama
from pipeline.resources import sha256_of
from pipeline.run.folder import write_whole
from pipeline.run.layout import Layout


def names_of(name: str | None, types: Sequence[str]) -> dict[str, str]:
    """The model's name in Ollama for each type: the first has the configured one, the others their type as the tag.

    Raises:
        UserError: Ollama would not take the name.
    """
    first = check_name(name or "model")
    model, _, tag = first.rpartition(":")
    stem = f"{model}:" if tag == "latest" else f"{first}-"
    return {kind: first if number == 0 else check_name(f"{stem}{kind}") for number, kind in enumerate(types)}


@dataclass(frozen=True)
class Found:
    """The Ollama that a run would be deployed to.

    Attributes:
        running: a server that answers; whoever asked closes it.
        program: what is started for the run where none answers; None: there is no Ollama.
        why: why no running one is taken.
    """

    running: Client | None = None
    program: Path | None = None
    why: str = ""


def find(host: str | None) -> Found:
    """The configured Ollama, else the one of OLLAMA_HOST, else a running one, else a program that can be started.

    Which program that is (PIPELINE_OLLAMA, for one) is decided by `find_ollama`.

    Args:
        host: the configured address.

    Raises:
        UserError: a configuration or OLLAMA_HOST names one, which cannot be asked: then no other is taken.
    """
    address, given = host or usual_host(), given_host()
    try:
        return Found(running=Client(address))
    except UserError as error:
        if host:
            raise UserError(f"{error}. Without ollama.host one is started for the run") from None
        if given:
            raise UserError(f"OLLAMA_HOST={given}: {error}. Without OLLAMA_HOST one is started for the run") from None
        return Found(program=find_ollama(), why=str(error))


@contextmanager
def server(host: str | None, store: Path, log: Path) -> Iterator[tuple[Client, bool, Path | None] | str]:
    """The Ollama of `find`, to deploy to. One of our own is stopped at the end.

    Args:
        host: the configured address.
        store: the models of a server of our own.
        log: its log.

    Yields:
        The client, whether the server is our own, and its log; or, if there is no Ollama, why.

    Raises:
        UserError: the one that is named cannot be asked.
    """
    found = find(host)
    if found.running is not None:
        with found.running:
            yield found.running, False, None
        return
    telling = "too old" in found.why  # that nothing answers at the usual address is nothing to tell
    if found.program is None:
        yield found.why if telling else "no Ollama is running and none is installed"
        return
    if telling:
        console.warn(f"{found.why}. Instead of it, one is started for the run")
    with OllamaServer(store, program=found.program, log=log) as own, Client(own.host) as client:
        yield client, True, own.log


def refuse_taken(client: Client, name: str, layout: Layout, *, replace: bool) -> None:
    """A model of this name that another made is not replaced unless that is asked for.

    Args:
        client: the server.
        name: the name with its tag.
        layout: the run, which may have been deployed before.
        replace: it is asked for.

    Raises:
        UserError: the name is taken.
    """
    digest = client.digest(name)
    before: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # nothing was deployed from this run yet
        before = json.loads(layout.deployment.read_text(encoding="utf-8"))
    ours = [model["digest"] for model in before.get("models", ()) if canonical(model["name"]) == canonical(name)]
    ours += _published(layout).get(canonical(name), [])
    if digest is not None and digest not in ours and not replace:
        raise UserError(
            f"ollama.name: a model {name!r} is at {client.host} already, and this run did not make it; choose "
            "another name, or replace it with ollama.replace = true (`pipeline deploy --replace`)"
        )


def remember(layout: Layout, digests: Mapping[str, str]) -> None:
    """Write down what is about to be published, so that after a crash the run knows its own models.

    Args:
        layout: the run.
        digests: name -> digest.
    """
    published = _published(layout)
    for name, digest in digests.items():
        published[canonical(name)] = sorted({*published.get(canonical(name), []), digest})
    write_whole(layout.published, json.dumps(published, indent=1) + "\n")


def _published(layout: Layout) -> dict[str, list[str]]:
    try:
        return dict(json.loads(layout.published.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def local_store(client: Client) -> Path | None:
    """The folder of a running server's models if it is on this machine, known by a model that both have; else None."""
    digests = set(client.names().values())
    given = os.environ.get("OLLAMA_MODELS")
    usual = (Path("~/.ollama/models").expanduser(), Path("/usr/share/ollama/.ollama/models"))
    for folder in (Path(given),) if given else usual:
        with suppress(OSError):  # another user's
            manifests = (path for path in (folder / "manifests").rglob("*") if path.is_file())
            if any(sha256_of(path) in digests for path in manifests):
                return folder
    return None

"""A run's model, served again: the deployed one by the Ollama that has it or one of our own, a file by llama-server."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.llamacpp.gguf_template import template_of
from pipeline.llamacpp.server import LlamaServer
from pipeline.ollama.client import Client
from pipeline.ollama.server import OllamaServer
from pipeline.prompt.guard import guarded


@contextmanager
def deployed(run: Path, log: Path | None = None) -> Iterator[tuple[Client, str] | None]:
    """Open the server that has the run's first model.

    Args:
        run: the run's folder, in which `deploy` has run.
        log: where the log of a server of our own is kept.

    Yields:
        The client and the model's name, or None if the run was not deployed.

    Raises:
        PipelineError: the model that was deployed is not there any more, or is another one.
    """
    record = json.loads((run / "deploy" / "deploy.json").read_text(encoding="utf-8"))
    if not record["deployed"]:
        yield None
        return
    model = record["models"][0]
    if record["own_server"]:
        with OllamaServer(run / record["models_folder"], log=log) as server, Client(server.host) as client:
            _check(client, model["name"], model["digest"])
            yield client, model["name"]
    else:
        with Client(record["host"]) as client:
            _check(client, model["name"], model["digest"])
            yield client, model["name"]


def llama_server(gguf: Path, context: int = 4096, log: Path | None = None) -> LlamaServer:
    """A llama-server that renders a file's chat template as it was trained: it would give it a date, and say to think.

    Args:
        gguf: the file.
        context: tokens of context.
        log: where its log and the template are kept, if they are.

    Raises:
        UserError: there is no such file, or it carries no chat template.
    """
    template = guarded(template_of(gguf).source, thinking_not_said=True)
    return LlamaServer(gguf, context=context, template=template, log=log)


def _check(client: Client, name: str, digest: str) -> None:
    if client.digest(name) != digest:
        raise PipelineError(
            f"{name} in Ollama is not, or no longer, the model that this run deployed; `pipeline deploy --force` "
            "deploys it again"
        )

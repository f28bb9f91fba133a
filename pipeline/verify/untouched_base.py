"""preflight: what would fail after hours of training fails here, in the first minutes.

The untouched base goes the whole way, and is judged on it by the checks that will judge the result: converted,
quantized, loaded by llama.cpp and by Ollama, its tokenizer and its chat template tried on the same hostile texts and
conversations. What the machine and the server must have for the run is counted before it starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.console import progress
from pipeline.errors import PipelineError
from pipeline.llamacpp.converter import adapter_command, check_places, convert_adapter
from pipeline.llamacpp.gguf_file import GGUFInfo
from pipeline.llamacpp.quantizer import quantize
from pipeline.llamacpp.rope import other_angles
from pipeline.model import memory, targets
from pipeline.model.adapter_file import AdapterFile
from pipeline.model.adapter_folder import CONFIG, WEIGHTS, Adapter, fit_to, read_given_adapter
from pipeline.model.base import as_trained, base_folder
from pipeline.model.combined_adapter import read_given_adapters
from pipeline.model.config_file import text_config
from pipeline.model.continued_adapter import read_continued_adapter
from pipeline.model.merge_target import check_bits, sixteen_bit_base
from pipeline.model.plain_adapter import A, B, refuse_for_gguf, write_plain
from pipeline.model.trained_tokenizer import trained_tokenizer
from pipeline.model.weights_file import read_weights
from pipeline.ollama.client import Client
from pipeline.ollama.llamacpp_rendering import carried_template
from pipeline.ollama.ollama_server import OllamaServer, find_ollama
from pipeline.ollama.rendering import choose, refusal
from pipeline.ollama.target import names_of, refuse_taken, server
from pipeline.processes import require_space
from pipeline.prompt.template import ChatTemplate
from pipeline.run.layout import Layout
from pipeline.setup import gpu
from pipeline.verify import logits, machine_needs, prompt, quantization, token_ids, toolchain, weights
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.chain import run_check
from pipeline.verify.result import FAIL, Claim, Result, document

# Enough to tell right from wrong; the result itself is judged on all that the configuration asks for.
_TOKENS, _STRINGS = 1000, 2000
_CONVERTED = Claim("preflight.convert", "convert", "the pinned converter takes the base")
_ANGLES = Claim("preflight.rope", "convert", "llama.cpp turns every position by the trained angles")
_ADAPTER = Claim("preflight.adapter", "convert", "the pinned converter takes the adapter, and the base has its places")
_TEMPLATE = Claim("preflight.template", "modelfile", "the base's chat template can be served exactly")
_TOOLS = Claim("preflight.tools", "modelfile", "the served model takes tools")
_TARGET = Claim("preflight.target", "deploy", "there is an Ollama to deploy to, and the names are free")
_SERVED = Claim("preflight.served", "deploy", "Ollama loads the quantized base and answers")


def preflight(config: Config, run_folder: Path, scratch: Path, stages: Sequence[str]) -> dict[str, Any]:
    """preflight.json: the verdicts in the order of the work, in the form of verify.json.

    Args:
        config: the resolved configuration.
        run_folder: where the run's files will be.
        scratch: an empty folder for the files that are made on the way.
        stages: the stages whose outputs are judged, in the order of the work.

    Raises:
        UserError: there is no such base, or an adapter from elsewhere is not one of it.
    """
    base = base_folder(config.model)
    check_bits(base, config)
    for given in read_given_adapters(config):  # what is wrong with one ends the run before anything long begins
        if config.export.as_ == "adapter":
            refuse_for_gguf(given.folder, given.settings, given.weights.shapes)
        fit_to(given, base, trust_remote_code=config.model.trust_remote_code)
    if config.train.from_adapter is not None:
        read_continued_adapter(config)
    trained, _ = trained_tokenizer(config)
    base = as_trained(sixteen_bit_base(config, scratch / "base-16bit"), trained, scratch / "base")
    stored = read_weights(base)
    parameters = stored.parameters
    needed = memory.untouched_base(parameters, machine_needs.quantized_files(config, parameters))
    require_space(scratch, needed, "preflight's copies of the base")
    results = list(machine_needs.check(config, run_folder, stored, gpu.memory()))
    results += _run("toolchain", "convert", lambda: iter([toolchain.check_pin()]))
    results += _run("preflight.target", "deploy", partial(check_target, config, run_folder, scratch))
    results += _run("preflight.template", "modelfile", partial(_template, config, base))
    artefacts = _artefacts(config, base, scratch)
    results += _run("preflight.convert", "convert", partial(_convert, artefacts))
    if not any(result.verdict == FAIL for result in results if result.stage == "convert"):
        if config.export.as_ == "adapter":
            check = partial(check_adapters, config, base, artefacts.expected, scratch)
            results += _run("preflight.adapter", "convert", check)
        results += _judge(artefacts)
        results += _run("preflight.served", "deploy", partial(_serve, artefacts, scratch))
    return document(results, stages)


def _run(name: str, stage: str, check: Callable[[], Iterator[Result]]) -> list[Result]:
    """What set-up has not brought is a failure here: afterwards it would be one of the run."""
    results = run_check(name, stage, check)
    missing = name, "the check can be run"
    return [replace(result, verdict=FAIL) if (result.id, result.sentence) == missing else result for result in results]


def _artefacts(config: Config, base: Path, scratch: Path) -> Artefacts:
    tokens, strings = min(_TOKENS, config.verify.tokens or _TOKENS), min(_STRINGS, config.verify.strings)
    settings = config.verify.model_copy(update={"tokens": tokens, "strings": strings})
    types = {kind: scratch / f"model-{kind}.gguf" for kind in config.export.quant}
    return Artefacts(settings=settings, model=base, sixteen_bit=None, quantized=types, scratch=scratch)


def _convert(artefacts: Artefacts) -> Iterator[Result]:
    """Make the files that the checks judge."""
    words = other_angles(text_config(artefacts.model))
    yield _ANGLES.holds(not words, words)
    source = artefacts.expected.path
    artefacts.sixteen_bit = source
    yield _CONVERTED.holds(True)
    for kind, target in artefacts.quantized.items():
        claim = Claim("preflight.quantize", f"quantize/{kind}", "llama-quantize makes this type of the base")
        try:
            with progress(f"quantizing the base to {kind}", None):
                quantize(source, target, kind)
        except PipelineError as error:
            yield claim.holds(False, str(error))
        else:
            yield claim.holds(True)


def check_adapters(config: Config, base: Path, gguf: GGUFInfo, scratch: Path) -> Iterator[Result]:
    """Whether the adapters that are given, or one of the modules that will be trained, can be GGUF files.

    Args:
        config: the resolved configuration.
        base: its folder.
        gguf: the base as the converter makes it.
        scratch: a folder for files that are made on the way.
    """
    stored = read_weights(base)
    given = read_given_adapters(config) or [_untrained(config, base, scratch / "adapter")]
    for number, adapter in enumerate(given):
        fit = fit_to(adapter, base, trust_remote_code=config.model.trust_remote_code)
        plain, target = scratch / f"plain-{number}", scratch / f"adapter-{number}.gguf"
        read = AdapterFile(adapter.folder, fit.settings, adapter.weights)
        numbers = write_plain(read, fit.record, stored, plain)
        converted = convert_adapter(adapter_command(plain, stored.folder, target), target, numbers)
        check_places(converted, gguf)
    yield _ADAPTER.holds(True)


def _untrained(config: Config, base: Path, folder: Path) -> Adapter:
    """An adapter of the modules that will be trained, of rank 1, whose every number is 1."""
    import torch
    from safetensors.torch import save_file

    modules = targets.of_base(base, config.lora, trust_remote_code=config.model.trust_remote_code)
    tensors = {}
    for name, (inner, outer) in modules.modules.items():
        tensors[f"base_model.model.{name}{A}"] = torch.ones(1, inner, dtype=torch.bfloat16)
        tensors[f"base_model.model.{name}{B}"] = torch.ones(outer, 1, dtype=torch.bfloat16)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": modules.peft}
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    return read_given_adapter(folder)


def _judge(artefacts: Artefacts) -> list[Result]:
    """The checks of `verify` that need no training; what they say of the merged model is said of the base here."""
    checks: dict[str, tuple[Callable[[Artefacts], Iterator[Result]], str]] = {
        "weights": (weights.check_base, "base"),
        "tokenizer": (token_ids.check_files, "convert"),
        "prompt": (prompt.check_files, "convert"),
        "logits": (logits.check, "convert"),
        "quantization": (quantization.check, "quantize"),
    }
    results: list[Result] = []
    for name, (check, stage) in checks.items():
        results += _run(name, stage, partial(check, artefacts))
    return [replace(result, stage="base") if result.stage == "merge" else result for result in results]


def _template(config: Config, base: Path) -> Iterator[Result]:
    template = ChatTemplate.from_folder(base)
    carried = carried_template(template)
    choice = choose(template, config.ollama.template, carried=carried)
    words = str(refusal(choice)) if choice.way == "refused" else ""
    yield _TEMPLATE.holds(choice.way != "refused", words, choice.way, "go or native")
    if carried.left_out:
        yield _TOOLS.not_run(carried.left_out)


def check_target(config: Config, run_folder: Path, scratch: Path) -> Iterator[Result]:
    """Whether there is a server to deploy to, and whether the model's names are free there."""
    names = names_of(config.ollama.name, config.export.quant)
    with server(config.ollama.host, Layout(run_folder).ollama_models, scratch / "target.log") as found:
        if isinstance(found, str):  # which is no failure of a run
            yield _TARGET.not_run(f"{found}: the run will end before deploying")
            return
        client, own, _ = found
        for name in names.values() if not own else ():
            refuse_taken(client, name, Layout(run_folder), replace=config.ollama.replace)
        yield _TARGET.holds(True, figure=f"Ollama {client.version}, {'of our own' if own else client.host}")


def _serve(artefacts: Artefacts, scratch: Path) -> Iterator[Result]:
    """Ollama has a llama.cpp of its own, which may not know what the pinned one does."""
    program = find_ollama()
    if program is None:
        yield _SERVED.not_run("there is no Ollama on this machine: `pipeline setup` builds one (it needs Go)")
        return
    _, path = next(iter(artefacts.quantized.items()))
    with OllamaServer(scratch / "models", program=program) as own, Client(own.host) as client:
        with progress("Ollama loads the base", None):
            digest = client.upload(path)
            client.create("preflight", {"files": {path.name: digest}, "parameters": {"num_ctx": 512}})
            answer = client.chat("preflight", [{"role": "user", "content": "Hi"}], options={"num_predict": 4})
        yield _SERVED.holds(bool(answer["content"].strip()), "it answered nothing", answer["content"])


def failures(content: dict[str, Any]) -> list[str]:
    """Every failure in words, in the order of the work."""
    return [f"{row['stage']}: {row['sentence']}: {row['words']}" for row in content["checks"] if row["verdict"] == FAIL]

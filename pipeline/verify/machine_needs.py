"""machine: what the run will need of disk and memory, counted from the size of the base, against what there is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.quantizer import quantization_type
from pipeline.model import memory
from pipeline.setup import gpu, libraries
from pipeline.setup.findings import OK, WARNING, Finding
from pipeline.setup.machine import existing, memory_bytes
from pipeline.verify.result import Claim, Result

_DISK = Claim("machine.disk", "base", "the disk holds what every stage will write")
_MEMORY = Claim("machine.memory", "base", "the merge fits into the memory")
_FLOAT32 = Claim("machine.float32", "base", "the model fits into the memory in float32, which the proof is computed in")
_GPU = Claim("machine.gpu", "base", "the base fits into the GPU's memory")
_VERSIONS = Claim("machine.versions", "base", "the libraries are those of requirements.lock")
_TRAINING_GPU = "what training on a GPU needs is there"


def check(config: Config, run_folder: Path, parameters: int, gpu_bytes: int | None) -> Iterator[Result]:
    """Judge the machine.

    Args:
        config: the resolved configuration.
        run_folder: its disk is meant.
        parameters: weights of the base.
        gpu_bytes: memory of the CUDA device; None without one.
    """
    needs = disk_needs(config, parameters)
    words = ", ".join(f"{what} {size / 1e9:.1f} GB" for what, size in needs.items())
    free = shutil.disk_usage(existing(run_folder)).free
    yield _bytes(_DISK, sum(needs.values()), free, f"{words}; free some space, or choose another folder (run.folder)")

    in_4bit, there = config.train.load_in_4bit, memory_bytes()
    merge = memory.merge(parameters, in_float32=False, dequantizes=in_4bit)
    yield _bytes(_MEMORY, merge, there, "take a smaller base or a larger machine")
    float32 = memory.float32_model(parameters)
    if float32 <= there:
        yield _bytes(_FLOAT32, float32, there)
    else:
        yield _FLOAT32.not_run(
            f"{float32 / 1e9:.0f} GB would be needed, {there / 1e9:.0f} GB are there: the logits of the "
            "merged model will not be compared with the 16-bit GGUF file's; its weights will be"
        )
    if config.adapter.path is not None:  # nothing is trained
        yield _judged(_VERSIONS, libraries.look())
        return
    if gpu_bytes is not None:
        training = memory.training(parameters, in_4bit=in_4bit)
        yield _bytes(_GPU, training, gpu_bytes, "take a smaller base or a larger GPU")
    environment = libraries.this_environment()
    torch = next((package.version for package in environment.installed() if package.name == "torch"), None)
    for finding in gpu.look(gpu.gpus(), libraries.locked_cuda(), torch):
        name = finding.subject.removeprefix("GPU").strip().lower().replace(" ", "_") or "found"
        yield _judged(Claim(f"machine.gpu.{name}", "base", _TRAINING_GPU), finding)
    yield _judged(_VERSIONS, libraries.look())


def disk_needs(config: Config, parameters: int) -> dict[str, int]:
    """Bytes that each stage will write and keep, and the most that one of them needs on the way."""
    sixteen_bit = 2 * parameters
    quantized = [int(parameters * _bits(kind) / 8) for kind in config.export.quant]
    # A native template is put into a copy of the file; Ollama keeps one of its own, and a second while it is proven.
    return {
        "checkpoints": int(0.2 * sixteen_bit),
        "merge": sixteen_bit,
        "convert": sixteen_bit,
        "quantize": sum(quantized),
        "modelfile": sum(quantized),
        "deploy": 0 if _elsewhere(config.ollama.host) else sum(quantized) + max(quantized),
        # The merged model converted again, the 16-bit file in float32, and llama-perplexity's reference.
        "verify": sixteen_bit + 2 * sixteen_bit + 2**30,
    }


def _elsewhere(host: str | None) -> bool:
    """Whether a server keeps its models on the disk of another machine."""
    return host is not None and not re.search(r"(^|/|@)(localhost|127\.|\[?::1)", host)


def _bits(kind: str) -> float:
    """Bits a weight of a type, taken generously: on small models many tensors fall back to larger types."""
    try:
        return max(quantization_type(kind).promised_bits or 16.0, 4.5) + 0.5
    except (PipelineError, UserError):
        return 16.0


def _bytes(claim: Claim, needed: int, there: int, remedy: str = "") -> Result:
    words = f"about {needed / 1e9:.1f} GB are needed, {there / 1e9:.1f} GB are there: {remedy}"
    return claim.holds(needed <= there, words, f"{needed / 1e9:.2f} GB", f"at most {there / 1e9:.1f} GB")


def _judged(claim: Claim, finding: Finding) -> Result:
    """What set-up and `pipeline doctor` would say of the machine, as a check."""
    if finding.state == WARNING:
        return claim.not_run(finding.sentence)
    return claim.holds(finding.state == OK, finding.sentence, finding.found)

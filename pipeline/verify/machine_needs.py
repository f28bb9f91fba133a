"""machine: what the run will need of disk and memory, counted from the size of the base, against what there is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import PipelineError, UserError
from pipeline.figures import size
from pipeline.llamacpp.quantizer import quantization_type
from pipeline.model import memory, training_memory
from pipeline.model.layer_by_layer import Layers
from pipeline.model.merge_target import chosen_base
from pipeline.model.weights_file import Weights
from pipeline.ollama.address import is_here, normal_host
from pipeline.setup import gpu, libraries
from pipeline.setup.machine import existing, memory_bytes
from pipeline.setup.machine_findings import OK, WARNING, Finding
from pipeline.verify.result import Claim, Result

_DISK = Claim("machine.disk", "base", "the disk holds what every stage will write")
_MEMORY = Claim("machine.memory", "base", "the merge fits into the memory")
_FLOAT32 = Claim("machine.float32", "base", "the model fits into the memory in float32, which the proof is computed in")
_GPU = Claim("machine.gpu", "base", "the base fits into the GPU's memory")
_TRAINING = Claim("machine.training", "base", "the base fits into the memory as it is trained")
_VERSIONS = Claim("machine.versions", "base", "the libraries are those of requirements.lock")
_TRAINING_GPU = "what training on a GPU needs is there"


def check(config: Config, run_folder: Path, base: Weights, gpu_bytes: int | None) -> Iterator[Result]:
    """Judge the machine.

    Args:
        config: the resolved configuration.
        run_folder: its disk is meant.
        base: its weights, in 16 or 32 bits.
        gpu_bytes: memory of the CUDA device; None without one.
    """
    parameters = base.parameters
    needs = disk_needs(config, parameters)
    words = ", ".join(f"{what} {size(needed)}" for what, needed in needs.items())
    free = shutil.disk_usage(existing(run_folder)).free
    yield _bytes(_DISK, sum(needs.values()), free, f"{words}; free some space, or choose another folder (run.folder)")

    in_4bit, there = config.train.load_in_4bit, memory_bytes()
    measures = chosen_base(config) is None
    remote = config.model.trust_remote_code
    if config.merge.way == "peft":
        merge = memory.merge_by_peft(parameters, in_float32=False, dequantizes=measures)
        yield _bytes(_MEMORY, merge, there, 'take merge.way = "tensors", a smaller base or a larger machine')
    elif measures and Layers(base, trust_remote_code=remote).lacking:  # `merge` measures it whole
        merge = memory.merge_by_peft(parameters, in_float32=False, dequantizes=True)
        yield _bytes(_MEMORY, merge, there, 'set merge.base to "16bit", take a smaller base or a larger machine')
    else:
        merge = memory.merge(base.own_shapes, measures=measures)
        yield _bytes(_MEMORY, merge, there, "take a smaller base or a larger machine")
    float32 = memory.float32_model(parameters)
    if float32 <= there:
        yield _bytes(_FLOAT32, float32, there)
    else:
        yield _FLOAT32.not_run(
            f"{size(float32)} would be needed, {size(there)} are there: the logits of the merged model "
            "will be computed layer by layer, and those of the 16-bit GGUF file in its own type"
        )
    if config.given_adapters:  # nothing is trained
        yield _judged(_VERSIONS, libraries.look())
        return
    if gpu_bytes is not None:
        training = training_memory.least_on_gpu(parameters, in_4bit=in_4bit)
        yield _bytes(_GPU, training, gpu_bytes, "take a smaller base or a larger GPU")
    else:
        training = training_memory.least_on_processor(parameters, in_4bit=in_4bit)
        remedy = "" if in_4bit else "set train.load_in_4bit=true, "
        yield _bytes(_TRAINING, training, there, f"{remedy}take a smaller base or a larger machine")
    environment = libraries.this_environment()
    torch = next((package.version for package in environment.installed() if package.name == "torch"), None)
    for finding in gpu.look(gpu.gpus(), libraries.locked_cuda(), torch):
        name = finding.subject.removeprefix("GPU").strip().lower().replace(" ", "_") or "found"
        yield _judged(Claim(f"machine.gpu.{name}", "base", _TRAINING_GPU), finding)
    yield _judged(_VERSIONS, libraries.look())


def quantized_files(config: Config, parameters: int) -> list[int]:
    """Bytes of each quantized file."""
    return [memory.quantized_file(parameters, _promised_bits(kind)) for kind in config.export.quant]


def disk_needs(config: Config, parameters: int) -> dict[str, int]:
    """Bytes that each stage will write and keep, and the most that one of them needs on the way."""
    host = config.ollama.host
    here, apart = host is None or is_here(normal_host(host)), config.export.as_ == "adapter"
    return memory.disk(
        parameters,
        quantized_files(config, parameters),
        served_here=here,
        apart=apart,
        keeps_merged=config.merge.keep,
    )


def _promised_bits(kind: str) -> float | None:
    try:
        return quantization_type(kind).promised_bits
    except (PipelineError, UserError):
        return None


def _bytes(claim: Claim, needed: int, there: int, remedy: str = "") -> Result:
    words = f"about {size(needed)} are needed, {size(there)} are there: {remedy}"
    return claim.holds(needed <= there, words, size(needed), f"at most {size(there)}")


def _judged(claim: Claim, finding: Finding) -> Result:
    """What set-up and `pipeline doctor` would say of the machine, as a check."""
    if finding.state == WARNING:
        return claim.not_run(finding.sentence)
    return claim.holds(finding.state == OK, finding.sentence, finding.found)

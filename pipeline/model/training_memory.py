"""What training needs of memory, part by part: weights, adapter, gradients, optimizer, activations. Sizes in bytes.

The coefficients were fitted to 13 runs on an H100 with Unsloth 2026.10.9: Llamas with 1.2, 3.2 and 8.0 billion weights,
4 and 16 bits, ranks 16 to 128, 900 to 16,000 tokens in a batch, with and without checkpointing. Their peaks come out
within 1.1 % on average and 7.2 % at worst (tests/model/test_training_memory.py). Other architectures were not measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.figures import GIB
from pipeline.model.shape import Shape

# NF4: half a byte, a byte for 64 weights, four bytes for 256 of these ("QLoRA", T. Dettmers et al., 2023, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
SIXTEEN_BIT = 2
FLOAT32 = 4
# Bytes that an optimizer keeps for each trained value.
OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0}
_OTHER_SHARE = 0.12  # of a base whose shape is not known: embeddings, head, norms
CHECKPOINTED = 1e9  # parameters, from which on a base on a GPU is trained with gradient checkpointing
_UNKNOWN = 8e9  # parameters of a base whose size could not be learned: a common size, and none of the smallest
_CUDA_CONTEXT = 2**29
_FRAGMENTS = 0.05  # of what is allocated lies free in pieces that are too small
_LIBRARIES = 3 * 2**29  # torch, transformers and Unsloth in a process


@dataclass(frozen=True)
class TrainingMemory:
    """The parts of a training's peak.

    Attributes:
        weights: of the base.
        adapter: its values in float32.
        gradients: as many.
        optimizer: what it keeps for each of them.
        activations: of the longest batch.
        workspace: matrices that are unpacked from 4 bits, and the loss over the vocabulary.
        beside: what the card or the machine must have free beyond what is allocated.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    beside: int

    @property
    def allocated(self) -> int:
        """What torch allocates at the peak."""
        parts = (self.weights, self.adapter, self.gradients, self.optimizer, self.activations, self.workspace)
        return sum(parts)

    @property
    def needed(self) -> int:
        """What must be free."""
        return self.allocated + self.beside


def _weights(linear: float, other: float, *, in_4bit: bool) -> float:
    return linear * (NF4_BYTES if in_4bit else SIXTEEN_BIT) + other * SIXTEEN_BIT


def base_on_gpu(parameters: float | None, *, in_4bit: bool) -> int:
    """The weights of a base of which no more is known than their number, or not even that (None)."""
    other = _OTHER_SHARE * (parameters or _UNKNOWN)
    return int(_weights((parameters or _UNKNOWN) - other, other, in_4bit=in_4bit) * (1 + _FRAGMENTS))


def least(parameters: float, *, in_4bit: bool) -> int:
    """The least that training needs of a GPU: the base, and a GiB for the adapter, its optimizer and one short row."""
    return base_on_gpu(parameters, in_4bit=in_4bit) + GIB


def default_batch(gpu_bytes: int, parameters: float | None, *, in_4bit: bool) -> int:
    """The default of train.batch on a GPU, in rows: what the base leaves over is for activations.

    Args:
        gpu_bytes: the GPU's memory.
        parameters: of the base; None where that is not known.
        in_4bit: the base is trained in 4 bits.
    """
    free = gpu_bytes - base_on_gpu(parameters, in_4bit=in_4bit)
    return 16 if free > 60 * GIB else 8 if free > 30 * GIB else 4 if free > 12 * GIB else 2


def checkpoints_gradients(parameters: float | None) -> bool:
    """Whether activations are better computed again than kept: they are what fills the GPU of a base of this size."""
    return (parameters or _UNKNOWN) > CHECKPOINTED


def on_gpu(shape: Shape, tokens: int, *, in_4bit: bool, checkpointing: bool, optimizer: str) -> TrainingMemory:
    """The peak of LoRA training on a GPU.

    Args:
        shape: the base and its adapter.
        tokens: of the longest batch: rows times the longest row.
        in_4bit: the layers' linear modules and experts are stored in NF4; else all is in 16 bits.
        checkpointing: activations are computed again in the backward pass, so that only one layer's are there at once.
        optimizer: as transformers names it; one that is not known here is counted as AdamW in float32.
    """
    weights = _weights(shape.linear + shape.experts, shape.other, in_4bit=in_4bit)
    if checkpointing:
        activations = tokens * (7.5 * shape.intermediate + 18 * shape.hidden)
    else:
        activations = tokens * shape.layers * (4.7 * shape.intermediate + 14.4 * shape.hidden)
    parts = TrainingMemory(
        weights=int(weights),
        adapter=FLOAT32 * shape.trained,
        gradients=FLOAT32 * shape.trained,
        optimizer=OPTIMIZER_BYTES.get(optimizer, 8) * shape.trained,
        activations=int(activations),
        workspace=int(1e8 + 2 * SIXTEEN_BIT * shape.largest),
        beside=_CUDA_CONTEXT,
    )
    return replace(parts, beside=_CUDA_CONTEXT + int(_FRAGMENTS * parts.allocated))


def on_processor(shape: Shape, tokens: int, *, in_4bit: bool, checkpointing: bool, optimizer: str) -> TrainingMemory:
    """The peak of LoRA training without a GPU, roughly: computed in float32, every layer's activations kept.

    Args: as `on_gpu`; `checkpointing` makes no difference.
    """
    parts = on_gpu(shape, tokens, in_4bit=in_4bit, checkpointing=False, optimizer=optimizer)
    weights = int(_weights(shape.linear, shape.experts + shape.other, in_4bit=in_4bit))  # experts stay in 16 bits
    logits = 3 * FLOAT32 * tokens * shape.vocabulary  # with their logarithms and their gradients
    return replace(parts, weights=weights, activations=2 * parts.activations, workspace=logits, beside=_LIBRARIES)


def full_fine_tuning(shape: Shape) -> int:
    """What training every weight would need before any activations: mixed precision with AdamW, 16 bytes a weight.

    Two for the weight in 16 bits, two for its gradient, twelve for the weight and AdamW's two moments in float32
    ("ZeRO", S. Rajbhandari et al., 2020, section 3.1).
    """
    return 16 * shape.parameters

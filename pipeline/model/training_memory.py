"""What training needs of memory, part by part: weights, adapter, gradients, optimizer, activations. Sizes in bytes.

On a GPU the coefficients were fitted to 13 runs on an H100 with Unsloth 2026.10.9: Llamas with 1.2, 3.2 and 8.0 billion
weights, 4 and 16 bits, ranks 16 to 128, 900 to 16,000 tokens in a batch, with and without checkpointing. Their peaks
come out within 1.1 % on average and 7.2 % at worst. Without one, those of 16 runs of 0.03 to 0.6 billion weights in
bfloat16 come out within 3.1 % and 7.9 % (tests/model/test_training_memory.py). Other architectures were not measured.
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
_LIBRARIES = 1.08e9  # torch, transformers, PEFT, TRL and Unsloth in a process, with the tokenizer
# glibc takes blocks of less than 32 MiB from a heap, where what a layer frees leaves holes: two fifths of what stays.
_HEAP, _HOLES = 2**25, 0.4
_LOGITS = 2**24  # of a piece of Unsloth's loss, which never has those of all tokens at once


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
        mapped: of the base's files, what is resident only until another needs the room: it need not be free.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    beside: int
    mapped: int = 0

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


def least_on_processor(parameters: float, *, in_4bit: bool) -> int:
    """The least that training needs without a GPU: the base, in 16 bits what is not in 4, and the libraries."""
    other = _OTHER_SHARE * parameters
    return int(_weights(parameters - other, other, in_4bit=in_4bit) + _LIBRARIES)


def least_on_gpu(parameters: float, *, in_4bit: bool) -> int:
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
        workspace=int(1e8 + 2 * SIXTEEN_BIT * max(shape.largest, shape.largest_experts)),
        beside=_CUDA_CONTEXT,
    )
    return replace(parts, beside=_CUDA_CONTEXT + int(_FRAGMENTS * parts.allocated))


def on_processor(
    shape: Shape,
    tokens: int,
    *,
    in_4bit: bool,
    checkpointing: bool,
    optimizer: str,
    bfloat16: bool,
    validates: bool,
) -> TrainingMemory:
    """The peak of LoRA training without a GPU, where transformers and PEFT compute it, with Unsloth's loss.

    Args: as `on_gpu`, and
        bfloat16: the processor computes in it; else in float32. The adapter is in float32 either way.
        validates: there is validation data.
    """
    number = SIXTEEN_BIT if bfloat16 else FLOAT32
    hidden, intermediate = tokens * shape.hidden, tokens * shape.intermediate
    # What autograd keeps of a layer, as its hooks count it. In bfloat16: queries, keys, values and what attention makes
    # of them (8 hidden), three of the gate (6 intermediate), and in float32 the inputs of the norms (8 hidden) and
    # PEFT's copy of every module's input (24 hidden, 4 intermediate). In float32 modules share their input.
    parts = (40 * hidden, 10 * intermediate) if bfloat16 else (32 * hidden, 16 * intermediate)
    layer, backward = sum(parts), 20 * intermediate  # gradients of a feed-forward, in both types, while they are made
    # Experts that are one parameter stay in 16 bits.
    weights = shape.linear * (NF4_BYTES if in_4bit else number) + (shape.experts + shape.other) * number
    # A piece in float32 and `number`, and the head as the matrix product packs it.
    logits = min(tokens * shape.vocabulary, _LOGITS) * (FLOAT32 + number)
    head = number * shape.vocabulary * shape.hidden
    workspace = logits + head
    if validates:  # with the logits of all tokens, in float32 too, and their logarithms
        workspace = max(workspace, tokens * shape.vocabulary * (number + 2 * FLOAT32))
    if checkpointing:  # the input of each layer; one is computed again when the loss is done. train.py sees to holes
        kept = number * hidden * shape.layers
        activations: float = kept + max(0, layer + backward - workspace)
    else:
        kept = layer * shape.layers
        blocks = (FLOAT32 * hidden, FLOAT32 * intermediate)
        holes = _HOLES * sum(part for part, block in zip(parts, blocks, strict=True) if block < _HEAP)
        activations = kept + holes * shape.layers + backward
        if in_4bit:  # NF4 is made of a matrix by five copies of it in float32, and the heap keeps as much in holes
            workspace += 2 * 5 * FLOAT32 * shape.largest
    return TrainingMemory(
        weights=int(weights),
        adapter=FLOAT32 * shape.trained,
        gradients=max(0, FLOAT32 * shape.trained - kept),  # they come as activations go
        optimizer=0 if optimizer == "sgd" else 8 * shape.trained,  # Unsloth takes AdamW in float32 for one in 8 bits
        activations=int(activations),
        workspace=workspace,
        beside=int(_LIBRARIES),
        mapped=SIXTEEN_BIT * shape.linear if in_4bit and bfloat16 else 0,
    )


def full_fine_tuning(shape: Shape) -> int:
    """What training every weight would need before any activations: mixed precision with AdamW, 16 bytes a weight.

    Two for the weight in 16 bits, two for its gradient, twelve for the weight and AdamW's two moments in float32
    ("ZeRO", S. Rajbhandari et al., 2020, section 3.1).
    """
    return 16 * shape.parameters

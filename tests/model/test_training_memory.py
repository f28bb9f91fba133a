"""The memory of training as it is counted, against peaks that were measured.

On an H100 torch reported them (26 November 2026); without a GPU they are the resident set of the stage's process, of
the runs of `benchmarks.plan` (28 November 2026, 2 cores, 24 GB).
"""

import json
from functools import cache
from typing import Any

import pytest
from support import bases
from support.small_models import scratch

from pipeline.config import Lora
from pipeline.model import training_memory
from pipeline.model.shape import Shape, shape_of
from pipeline.model.targets import without_weights
from pipeline.model.training_memory import NF4_BYTES, TrainingMemory, full_fine_tuning, on_gpu, on_processor

# Hidden, intermediate, layers, heads, tied: Llama 3.2 1B and 3B, Llama 3.1 8B; 128,256 words each.
LLAMAS = {
    "1b": (2048, 8192, 16, 32, True),
    "3b": (3072, 8192, 28, 24, True),
    "8b": (4096, 14336, 32, 32, False),
}
# Base, r, tokens of the longest batch, in 4 bits, checkpointing, torch.cuda.max_memory_allocated(); adamw_8bit.
PEAKS = [
    ("1b", 16, 912, True, True, 1504885248),
    ("1b", 16, 7968, True, True, 2083403264),
    ("1b", 16, 15936, True, True, 2866125312),
    ("1b", 16, 3984, True, False, 5640400896),
    ("1b", 16, 3872, False, True, 3048015872),
    ("3b", 16, 3984, True, True, 3169740288),
    ("3b", 64, 3984, True, True, 3908530688),
    ("3b", 16, 7744, True, True, 3603837440),
    ("3b", 16, 1936, False, True, 7101512192),
    ("3b", 16, 4040, True, False, 12034658304),
    ("8b", 16, 3984, True, True, 7187568128),
    ("8b", 16, 7968, True, True, 7941429248),
    ("8b", 128, 4040, True, True, 10168572928),
]
# Hidden, layers and words of a random Llama, r, tokens of the longest batch, in 4 bits, checkpointing, bfloat16, peak.
RESIDENT = [
    (512, 1, 49152, 16, 256, True, False, True, 1280593920),
    (512, 1, 49152, 16, 1024, False, False, True, 1450942464),
    (512, 1, 49152, 64, 4096, True, False, True, 1735979008),
    (768, 7, 49152, 16, 128, True, False, True, 1725005824),
    (768, 7, 49152, 16, 1024, False, False, True, 2151227392),
    (768, 7, 49152, 128, 1024, True, False, True, 2256351232),
    (768, 7, 49152, 16, 2048, True, False, True, 2909704192),
    (512, 9, 128256, 16, 512, True, False, True, 1994588160),
    (512, 9, 128256, 32, 2048, False, False, True, 2822406144),
    (1280, 10, 49152, 16, 128, True, False, True, 2489470976),
    (1280, 10, 49152, 64, 512, False, False, True, 2855501824),
    (1024, 11, 128256, 16, 512, True, False, True, 3051167744),
    (1536, 15, 49152, 16, 256, True, False, True, 3683975168),
    (1536, 15, 49152, 16, 256, False, False, True, 3183165440),
    (768, 7, 49152, 16, 2048, True, True, True, 1577738240),
    (1024, 11, 128256, 32, 1024, False, True, True, 2159656960),
    (768, 7, 49152, 16, 1024, False, False, False, 2545025024),
    (768, 7, 49152, 16, 512, True, False, False, 1989779456),
]


@cache
def llama(name: str, r: int) -> Shape:
    hidden, intermediate, layers, heads, tied = LLAMAS[name]
    return shape(r, hidden, intermediate, layers, heads, 8, 128256, tied=tied)


def shape(
    r: int, hidden: int, intermediate: int, layers: int, heads: int, kept: int, words: int, *, tied: bool
) -> Shape:
    folder = scratch() / f"shape-{hidden}-{layers}-{words}"
    folder.mkdir(exist_ok=True)
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": words, "hidden_size": hidden},
        **{"intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads},
        **{"num_key_value_heads": kept, "head_dim": hidden // heads, "tie_word_embeddings": tied},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return shape_of(without_weights(folder), Lora(r=r))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_experts_are_counted_as_they_are_stored(model_type: str) -> None:
    """All of a layer's are one tensor, which Unsloth packs on a GPU; the router beside them stays."""
    model = without_weights(bases.base(f"architecture-{model_type}", "smollm2-135m-instruct", model_type))
    weights = {name: of.numel() for name, of in model.named_parameters()}
    experts = [size for name, size in weights.items() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    attention = [size for name, size in weights.items() if name.endswith("_proj.weight")]
    shape = shape_of(model, Lora(r=4))
    assert len(experts) == 2 * shape.layers
    assert (shape.experts, shape.linear) == (sum(experts), sum(attention))
    assert shape.parameters == sum(weights.values())
    assert (shape.largest, shape.largest_experts) == (max(attention), max(experts))
    of: dict[str, Any] = {"tokens": 1, "in_4bit": True, "checkpointing": False, "optimizer": "sgd"}
    processor = on_processor(shape, **of, bfloat16=True, validates=False)
    card = on_gpu(shape, **of)
    assert processor.weights - card.weights == pytest.approx((2 - NF4_BYTES) * sum(experts), abs=2)


def test_a_base_by_its_parts() -> None:
    shape = llama("8b", 16)
    assert shape.parameters == 8_030_261_248
    assert shape.other == 2 * 128256 * 4096 + 65 * 4096  # embedding, head, norms
    assert (shape.layers, shape.hidden, shape.intermediate, shape.vocabulary) == (32, 4096, 14336, 128256)
    assert shape.trained == 41_943_040
    assert shape.modules == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 32
    )
    assert llama("1b", 16).parameters == 1_235_814_400
    assert full_fine_tuning(shape) == 16 * shape.parameters


def test_what_was_measured() -> None:
    errors = []
    for name, r, tokens, in_4bit, checkpointing, measured in PEAKS:
        counted = on_gpu(
            llama(name, r), tokens, in_4bit=in_4bit, checkpointing=checkpointing, optimizer="adamw_8bit"
        ).allocated
        errors.append(abs(counted / measured - 1))
        assert errors[-1] < 0.08, (name, r, tokens, counted, measured)
    assert sum(errors) / len(errors) < 0.02


def resident(
    hidden: int, layers: int, words: int, r: int, tokens: int, in_4bit: bool, checkpointing: bool, bfloat16: bool,
    *, validates: bool = False,
) -> TrainingMemory:  # fmt: skip
    """What is counted without a GPU for a Llama of `benchmarks.random_model`."""
    base = shape(r, hidden, 4 * hidden, layers, hidden // 64, hidden // 256, words, tied=True)
    return on_processor(
        base,
        tokens,
        in_4bit=in_4bit,
        checkpointing=checkpointing,
        optimizer="adamw_torch",
        bfloat16=bfloat16,
        validates=validates,
    )


def test_what_was_measured_without_a_gpu() -> None:
    errors = []
    for *settings, measured in RESIDENT:
        counted = resident(*settings)
        errors.append(abs((counted.needed + counted.mapped) / measured - 1))
        assert errors[-1] < 0.1, (settings, counted, measured)
    assert sum(errors) / len(errors) < 0.05


def test_validation_has_the_logits_of_all_tokens() -> None:
    """Ten bytes each in bfloat16, in float32 and as logarithms: 503 MB were seen for 1,024 tokens of 49,152 words."""
    settings = (768, 7, 49152, 16, 1024, False, False, True)
    few, many = (resident(*settings, validates=validates) for validates in (False, True))
    assert many.workspace == 10 * 1024 * 49152 > few.workspace


@pytest.mark.parametrize(("in_4bit", "optimizer"), [(False, "adamw_8bit"), (True, "adamw_torch")])
def test_what_costs_more(in_4bit: bool, optimizer: str) -> None:
    shape = llama("8b", 128)
    least = on_gpu(shape, 2048, in_4bit=True, checkpointing=True, optimizer="adamw_8bit")
    other = on_gpu(shape, 2048, in_4bit=in_4bit, checkpointing=True, optimizer=optimizer)
    assert other.allocated > least.allocated
    assert least.needed > least.allocated


@pytest.mark.parametrize(
    ("gpu", "parameters", "in_4bit", "batch"),
    [
        (80, 8e9, True, 16),
        (24, 8e9, True, 4),
        (24, None, True, 4),
        (16, 8e9, True, 2),
        (80, 8e9, False, 16),
        (24, 8e9, False, 2),
    ],
)
def test_a_batch_fills_what_the_base_leaves(gpu: int, parameters: float | None, in_4bit: bool, batch: int) -> None:
    assert training_memory.default_batch(gpu * 2**30, parameters, in_4bit=in_4bit) == batch

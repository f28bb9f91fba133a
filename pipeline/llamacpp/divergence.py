"""How far two models' predictions are apart, position by position: what conversion or quantization cost.

Computed in float64 from full logits, so that a divergence of 1e-9 is one and not rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.llamacpp.library import LlamaModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class DivergenceStatistics:
    """How far a model is from the reference. Divergences in nats, shares from 0 to 1.

    Attributes:
        positions: how many positions were compared.
        mean: mean KL divergence.
        uncertainty: its standard error.
        quantile_999: the divergence that 99.9 % of the positions do not exceed.
        maximum: the largest.
        median: the one in the middle.
        same_top: the share of positions with the same likeliest token.
    """

    positions: int
    mean: float
    uncertainty: float
    quantile_999: float
    maximum: float
    median: float
    same_top: float


@dataclass
class Divergence:
    """Collects positions with `add`, then gives figures over all of them.

    Divergences are in nats: KL(reference || other) = sum over tokens of p (log p - log q).
    """

    _kl: "list[NDArray[np.float64]]" = field(default_factory=list)
    _same: "list[NDArray[np.bool_]]" = field(default_factory=list)
    _lead: "list[NDArray[np.float64]]" = field(default_factory=list)
    largest_difference: float = 0.0

    def add(self, reference: "NDArray[np.float32]", other: "NDArray[np.float32]") -> None:
        """Compare logits.

        Args:
            reference: [positions, vocabulary], any scale (a constant added to a row changes nothing).
            other: the same positions and vocabulary of the other model.

        Raises:
            ValueError: the shapes differ.
        """
        import numpy as np
        from scipy.special import log_softmax

        if reference.shape != other.shape:
            raise ValueError(f"logits of shape {reference.shape} and {other.shape}")
        for start in range(0, len(reference), _ROWS_AT_ONCE):
            p, q = (
                log_softmax(logits[start : start + _ROWS_AT_ONCE].astype(np.float64), axis=-1)
                for logits in (reference, other)
            )
            rows = np.arange(len(p))
            p_top, q_top = p.argmax(-1), q.argmax(-1)
            self._kl.append((np.exp(p) * (p - q)).sum(-1))
            self._same.append(p_top == q_top)
            self._lead.append(p[rows, p_top] - p[rows, q_top])
            # Of likely tokens only: the logarithm of nothing differs by much and means nothing.
            likely = np.maximum(p, q) > np.log(1e-4)
            self.largest_difference = max(self.largest_difference, float(np.abs(p - q)[likely].max(initial=0.0)))

    @property
    def positions(self) -> int:
        """How many positions were compared."""
        return sum(map(len, self._kl))

    @property
    def mean(self) -> float:
        """The mean KL divergence."""
        import numpy as np

        return float(np.concatenate(self._kl).mean())

    def quantile(self, share: float) -> float:
        """The KL divergence that this share of the positions does not exceed, e.g. 0.999."""
        import numpy as np

        return float(np.quantile(np.concatenate(self._kl), share))

    @property
    def same_top(self) -> float:
        """The share of positions where both think the same token the likeliest."""
        import numpy as np

        return float(np.concatenate(self._same).mean())

    @property
    def largest_lead_lost(self) -> float:
        """Where the top tokens differ: by how much, in log probability, the reference preferred its own, at most."""
        import numpy as np

        return float(np.concatenate(self._lead).max(initial=0.0))

    @property
    def statistics(self) -> DivergenceStatistics:
        """All figures at once."""
        import numpy as np

        values = np.concatenate(self._kl)
        return DivergenceStatistics(
            positions=self.positions,
            mean=self.mean,
            uncertainty=float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0,
            quantile_999=self.quantile(0.999),
            maximum=float(values.max()),
            median=self.quantile(0.5),
            same_top=self.same_top,
        )


def compare_files(
    reference: Path, other: Path, rows: Sequence[Sequence[int]], adapter: Path | None = None
) -> Divergence:
    """Compare two GGUF files of one vocabulary over all positions of some rows.

    The reference is computed exactly, the other file as llama-server computes it. One is loaded after the other, so
    the logits of the reference are kept: 4 bytes for each position and word of the vocabulary.

    Args:
        reference: the file that the other is held against.
        other: the file that is judged.
        rows: token ids; nothing is added to them.
        adapter: a LoRA adapter as GGUF, which the other file is used with.

    Raises:
        PipelineError: llama.cpp cannot load a file.
    """
    context = max(map(len, rows))
    with LlamaModel(reference, context=context) as model:
        expected = [model.logits(ids) for ids in rows]
    divergence = Divergence()
    with LlamaModel(other, adapter=adapter, context=context, exact=False) as model:
        for ids, logits in zip(rows, expected, strict=True):
            divergence.add(logits, model.logits(ids))
    return divergence

"""How far two models' predictions are apart, position by position: what conversion or quantization cost.

Computed in float64 from full logits, so that a divergence of 1e-9 is one and not rounding.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ROWS_AT_ONCE = 64


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

        if reference.shape != other.shape:
            raise ValueError(f"logits of shape {reference.shape} and {other.shape}")
        for start in range(0, len(reference), _ROWS_AT_ONCE):
            p = _log_softmax(reference[start : start + _ROWS_AT_ONCE])
            q = _log_softmax(other[start : start + _ROWS_AT_ONCE])
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


def _log_softmax(logits: "NDArray[np.float32]") -> "NDArray[np.float64]":
    import numpy as np

    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    normalised: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalised

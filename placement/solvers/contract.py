"""What every strategy is given and what it returns. Knows no strategy, no map and no profile."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from placement.layer_problem import LayerProblem

Slots = npt.NDArray[np.int64]
"""int64 (P,), the logical expert in each slot, -1 where empty; slot p sits on rank p // slots_per_rank."""


class Strategy(Protocol):
    """A way to place one layer."""

    def __call__(self, problem: LayerProblem, rng: np.random.Generator) -> Slots:
        """The expert in each slot; every expert has one at least, and no rank holds one twice.

        The same seed gives the same plan.
        """
        ...

"""Which experts are alike: the cosine between their router logits over all tokens, accumulated batch by batch.
Knows no constraint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import safetensors
import torch
from safetensors.numpy import save as to_safetensors
from torch import nn
from torch.utils.hooks import RemovableHandle

from placement.constraints.routers import find_routers
from profiler.errors import CoterieError
from profiler.families import read_spec
from profiler.files import write_bytes
from profiler.recorder import by_name, inputs_and_mask
from profiler.spec import MoESpec

SCHEMA_VERSION = 1
"""Of the table's file; another one is refused."""


@dataclass(frozen=True)
class SimilarityTable:
    """Sums over tokens from which similarities follow; sums of several runs add up.

    Attributes:
        model: the MoE layers.
        products: float64 (L, E, E), sum over tokens of the product of two experts' logits.
        num_tokens: tokens summed over.
    """

    model: MoESpec
    products: npt.NDArray[np.float64]
    num_tokens: int

    @property
    def similarity(self) -> npt.NDArray[np.float32]:
        """float32 (L, E, E), between -1 and 1: the cosine of two experts' sequences of logits (Occult)."""
        norms_LE = np.sqrt(np.maximum(np.diagonal(self.products, axis1=1, axis2=2), np.finfo(np.float64).tiny))
        return (self.products / norms_LE[:, :, None] / norms_LE[:, None, :]).astype(np.float32)

    def save(self, path: Path) -> None:
        """Write one safetensors file, renamed into place when complete.

        Raises:
            CoterieError: it cannot be written.
        """
        header = {"schema_version": SCHEMA_VERSION, "model": self.model.to_json(), "num_tokens": self.num_tokens}
        write_bytes(path, to_safetensors({"products": self.products}, {"coterie": json.dumps(header, sort_keys=True)}))

    @classmethod
    def load_from(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            CoterieError: it is missing, truncated or no similarity table.
        """
        if not path.is_file():
            raise CoterieError(f"{path}: no such file; make one with `coterie profile --similarity`")
        try:
            with safetensors.safe_open(path, framework="numpy") as stored:
                header, products = json.loads((stored.metadata() or {})["coterie"]), stored.get_tensor("products")
            if header["schema_version"] != SCHEMA_VERSION or not np.isfinite(products).all():
                raise CoterieError(f"schema_version {header['schema_version']!r}, or numbers that are not finite")
            model = MoESpec.from_json(header["model"])
            if products.shape != (model.num_layers, model.num_experts, model.num_experts):
                raise CoterieError(f"products {products.shape}: must be (layers, experts, experts)")
            return cls(model, products.astype(np.float64), int(header["num_tokens"]))
        except (CoterieError, safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CoterieError(f"{path}: not a similarity table ({error}); profile with --similarity again") from error

    def __add__(self, other: SimilarityTable) -> SimilarityTable:
        """Over the tokens of both.

        Raises:
            CoterieError: they are of different models.
        """
        if not self.model.routes_like(other.model):
            raise CoterieError(
                f"similarity of {self.model.describe()} and of {other.model.describe()}: give tables of one model"
            )
        return SimilarityTable(self.model, self.products + other.products, self.num_tokens + other.num_tokens)


class RouterSimilarity:
    """Sum up router logits while a model runs, alone or around a `Recorder`'s forward passes.

    Tokens whose attention mask is 0 are left out.  Sums stay on the routers' devices until `table` is asked for.

    Example::

        with Recorder(model) as recorder, RouterSimilarity(model) as similarity:
            model(input_ids=input_ids, attention_mask=attention_mask)
        table = similarity.table()
    """

    def __init__(self, model: nn.Module, name: str = "model") -> None:
        """Find the model's routers.

        Raises:
            CoterieError: it has none that score by a softmax.
        """
        self._model = model
        self._routers = find_routers(model)
        self._spec = read_spec(model, name)
        self._sums: list[torch.Tensor | None] = [None] * len(self._routers)
        self._num_tokens: torch.Tensor | int = 0
        self._keep: torch.Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self._handles.append(self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        for layer, router in enumerate(self._routers):
            self._handles.append(router.module.register_forward_hook(self._make_hook(layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def table(self) -> SimilarityTable:
        """What was summed up so far.

        Raises:
            CoterieError: no token was.
        """
        sums = [part.cpu().numpy() for part in self._sums if part is not None]
        if len(sums) < len(self._sums) or int(self._num_tokens) == 0:
            raise CoterieError("no token was seen: run the model inside the `with` block")
        return SimilarityTable(self._spec, np.stack(sums), int(self._num_tokens))

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs, mask = inputs_and_mask(args[:1], by_name(module.forward, args, kwargs))
        self._keep = mask[:, -inputs.shape[1] :].flatten()
        self._num_tokens = self._num_tokens + self._keep.sum()

    def _make_hook(self, layer: int) -> Any:
        @torch.no_grad()
        def add_products(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            logits_TE = output[0].detach().float()
            assert self._keep is not None  # the model's own hook comes first
            logits_TE = logits_TE * self._keep.to(logits_TE.device, logits_TE.dtype)[:, None]
            products_EE = (logits_TE.T @ logits_TE).double()
            before = self._sums[layer]
            self._sums[layer] = products_EE if before is None else before + products_EE

        return add_products


def similarity_reference(logits_TE: list[list[float]]) -> list[list[float]]:
    """The cosine of every two columns, one by one."""
    columns = list(zip(*logits_TE, strict=True))
    norms = [sum(value * value for value in column) ** 0.5 for column in columns]
    return [
        [
            sum(a * b for a, b in zip(one, other, strict=True)) / (norm * other_norm)
            for other, other_norm in zip(columns, norms, strict=True)
        ]
        for one, norm in zip(columns, norms, strict=True)
    ]

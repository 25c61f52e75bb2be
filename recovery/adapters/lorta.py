"""LoRTA: one low-rank tensor over layers, heads and the four attention matrices.

Paper: arXiv 2410.04060. For head h of matrix m (q, k, v, o) in layer l, transposed,

    dW[l, m, h]^T = s A diag(Ch[h] * Cm[m] * Cl[l]) B      [d, head size]

with heads side by side on the output side of q, k, v and on the input side of o; s = alpha / rank. A [d, rank],
B [rank, head size], Ch [heads, rank], Cm [4, rank] and Cl [layers, rank] are trained and shared by the whole model:
rank (d + head size + heads + layers + 4) parameters. B starts at zero, the others uniform in +-1/sqrt(rank)
(Kaiming with a = sqrt 5). Merge: W + dW. The product form is taken in all branches (one of the original's adds).

Ours, for grouped-query attention and pruned layers, where the paper assumes equal square matrices: a pair A, B for
every width d that occurs; key-value heads have a Ch of their own. A head's number is its place in the layer: a pruned
model does not say which head it was. Only attention's projections are served; other targets are refused.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from recovery.base import Adapter, AdapterConfig, Layer, Tensors, generator_of, random_uniform, zeros

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")


class Config(AdapterConfig, frozen=True):
    """LoRTA's options."""

    learning_rate: ClassVar[float] = 1e-2
    without_patterns = "LoRTA's tensor is the whole model's, of one rank and scale"
    method: Literal["lorta"] = "lorta"
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=MATRICES, description="some of attention's projections (q_proj, k_proj, v_proj, o_proj)"
    )
    rank: int = Field(default=64, ge=1, description="components of the tensor")
    alpha: float = Field(default=128.0, gt=0, description="numerator of the scale")

    @field_validator("targets", mode="before")
    @classmethod
    def _attention(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list | tuple):
            odd = [name for name in names if str(name).rpartition(".")[2] not in MATRICES]
            if odd:
                raise ValueError(f"lorta serves {', '.join(MATRICES)}, not {odd[0]!r}: name some of these")
        return value


class _Place:
    """Where a layer's matrix lies in the tensor."""

    def __init__(self, layer: Layer) -> None:
        matrix, size = layer.name.rpartition(".")[2], layer.head_size
        if matrix not in MATRICES:
            raise ValueError(f"targets: lorta serves {', '.join(MATRICES)}, not {layer.name}: name some of these")
        self.outward = matrix == "o_proj"  # heads lie on the input side
        self.width, channels = (layer.outputs, layer.inputs) if self.outward else (layer.inputs, layer.outputs)
        if not size or channels % size:
            raise ValueError(f"{layer.name}: {channels} channels are not whole heads of {size}: lorta cannot serve it")
        self.matrix, self.heads, self.size = MATRICES.index(matrix), channels // size, size
        number = re.search(r"\.(\d+)\.", layer.name)
        self.layer = int(number[1]) if number else 0
        self.table = "heads_kv" if matrix in ("k_proj", "v_proj") else "heads"


class Method(Adapter[Config]):
    """One matrix's view of the shared tensor."""

    def __init__(self, config: Config, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.place = _Place(layer)

    @classmethod
    def share(cls, config: Config, layers: list[Layer], seed: int) -> Tensors:
        places, generator, bound = [_Place(layer) for layer in layers], generator_of(seed), config.rank**-0.5
        shared, size = Tensors(), places[0].size
        for width in sorted({place.width for place in places}):
            shared.trainable[f"A_{width}"] = random_uniform((width, config.rank), bound, generator)
            shared.trainable[f"B_{width}"] = zeros(config.rank, size)
        for table in ("heads", "heads_kv"):
            if heads := [place.heads for place in places if place.table == table]:
                shared.trainable[table] = random_uniform((max(heads), config.rank), bound, generator)
        for table, count in (("matrices", len(MATRICES)), ("layers", 1 + max(place.layer for place in places))):
            shared.trainable[table] = random_uniform((count, config.rank), bound, generator)
        return shared

    def _parts(self, kind: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A [d, rank], B [rank, head size] and the components' sizes [heads, rank], s included, in kind's dtype."""
        own, place = self.shared.trainable, self.place
        sizes = own[place.table][: place.heads] * own["matrices"][place.matrix] * own["layers"][place.layer]
        sizes = self.config.alpha / self.config.rank * sizes
        return own[f"A_{place.width}"].to(kind.dtype), own[f"B_{place.width}"].to(kind.dtype), sizes.to(kind.dtype)

    def delta(self, weight: Tensor) -> Tensor:
        down, up, sizes = self._parts(self.shared.trainable["layers"])
        heads = ((down * sizes[:, None, :]) @ up).transpose(1, 2)  # [heads, head size, d]
        delta = heads.flatten(0, 1)
        return delta.T if self.place.outward else delta

    def forward(self, x: Tensor, weight: Tensor, product: Tensor | None) -> Tensor:
        down, up, sizes = self._parts(x)
        if self.place.outward:
            components = (x.unflatten(-1, (self.place.heads, self.place.size)) @ up.T) * sizes
            return components.sum(-2) @ down.T
        return (((x @ down)[..., None, :] * sizes) @ up).flatten(-2)

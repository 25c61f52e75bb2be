"""The contract of an adapter: a trainable delta on a frozen linear layer `y = W x (+ b)`, W [out, in].

A method computes with the tensors it is given and keeps them in two named sets: `trainable`, float32, which the
optimizer changes and a checkpoint stores; `bases`, frozen and random, rebuilt from the seed, never stored.
`recovery.inject` registers both on a module, moves them, casts the input, and hands the method its layer's weight.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Generator, Tensor


class AdapterConfig(BaseModel):
    """Base of every adapter's `Config`. `targets`: every linear layer of the decoder, or these module names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on the adapter's input only")


@dataclass(frozen=True)
class Layer:
    """What an adapter is built from: the layer's name, shape and weight, its own generator, and the shared bases."""

    name: str
    weight: Tensor  # [out, in], frozen, any floating dtype
    generator: Generator  # private to this layer: seeded by the run's seed and the layer's name
    shared: dict[str, Tensor] = field(default_factory=dict)

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]


class Adapter:
    """One layer's adapter. A method sets `trainable` (and `bases`) in `__init__` and defines `delta`.

    `forward` may be cheaper than a product with `delta()`, and must equal it. A method whose effect is not W + delta
    on the output alone (DoRA) overrides `forward` with what it adds to the layer's own output.
    """

    trainable: dict[str, Tensor]
    bases: dict[str, Tensor]

    def __init__(self, config: AdapterConfig, layer: Layer) -> None:
        self.config = config
        self.trainable = {}
        self.bases = {}

    @classmethod
    def shared(cls, config: AdapterConfig, shapes: list[tuple[int, int]], generator: Generator) -> dict[str, Tensor]:
        """Bases that all layers share, from the (out, in) shapes of every adapted layer. None by default."""
        return {}

    def delta(self, weight: Tensor) -> Tensor:
        """float32 [out, in]: what merging adds to the frozen weight."""
        raise NotImplementedError

    def forward(self, x: Tensor, dropped: Tensor, weight: Tensor) -> Tensor:
        """What is added to the layer's output W x (without bias); x [..., in], `dropped` is x after dropout."""
        raise NotImplementedError


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any printable parts, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def digest_of(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, shapes and float32 bytes: how rebuilt bases are told from other ones."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().float().cpu().contiguous()
        total.update(f"{name}{tuple(tensor.shape)}".encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()

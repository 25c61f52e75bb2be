"""EDoRA: DoRA whose factors are frozen singular vectors of the weight, with a small trained matrix between them.

Paper: arXiv 2501.12067. With W ~ U S V^T cut to `rank`: A = S V^T [rank, in] and B = U [out, rank], frozen;
W' = m * (W + s B R A) / ||W + s B R A||, norm and m per row, the norm constant in the backward pass, s = alpha / rank.
Trained: R [rank, rank] and m [out], which starts at W's row norms: rank^2 + out parameters. Merge: W'.

Ours: R starts at zero, an exact start (the paper: N(0, 1e-10), about 1e-5 off), and receives the same gradient. As in
the paper the decomposition takes 10 power iterations; here from the layer's own seed, and A and B are saved with the
adapter, never computed again for a merge (their signs and accuracy would differ).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from recovery.adapters import dora, lora
from recovery.base import Layer, Tensors, generator_of, random_normal, zeros

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
ITERATIONS, SPARE = 10, 8  # power iterations, and vectors beyond the rank that they carry along


class Config(lora.LowRankConfig, frozen=True):
    """EDoRA's options."""

    learning_rate: ClassVar[float] = 1e-2
    method: Literal["edora"] = "edora"


class Method(dora.Magnitude[Config]):
    """One layer's R and magnitude, and its frozen factors."""

    def __init__(self, config: Config, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.rank = min(self.rank, layer.inputs, layer.outputs)  # s, too, is of the rank that there is
        up, down = decomposed(layer.weight, self.rank, layer.seed)
        self.kept["A"], self.kept["B"] = down.cpu(), up.cpu()
        self.trainable["R"] = zeros(self.rank, self.rank)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.kept["A"], self.kept["B"] @ self.trainable["R"]


def decomposed(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """U [out, rank] and S V^T [rank, in] of a weight [out, in], float32, largest first, by subspace iteration."""
    import torch

    matrix = weight.detach().float()
    width = min(rank + SPARE, *matrix.shape)
    start = random_normal((matrix.shape[1], width), 1.0, generator_of(seed)).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, sizes, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank].contiguous(), (sizes[:rank, None] * right[:rank]).contiguous()

"""HyWIA-style, our construction: fine and coarse importance of a structure, fused adaptively.

Paper: arXiv 2403.10799. Its equations are not published in reach; this is our construction, from what is known: Taylor
importance of single weights (fine) and of whole structures (coarse), fused by an attention between the two. Within one
layer and kind, over structures i, with w a weight, g its gradient, h the mean squared per-sample gradient:

    F_i = sum over the structure's weights of |w g - 0.5 w h w|      C_i = sum over its tensors of |sum of w g|
    u = standardised log F,  v = standardised log C                  (1e-12 of the layer's maximum added before the log)
    c = (u + v) / 2          (a, b) = softmax(c u / tau, c v / tau)  score = a u + b v

For large tau the score is the mean of both; where both agree it is that ranking.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pruning.config import PruningConfig, Statistic

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pruning.architecture import Architecture
    from pruning.structures import Scores, Vectors

VERSION = 2


class Config(PruningConfig):
    """`temperature` is tau; `curvature` false leaves h out and spares one backward pass a sample."""

    method: Literal["hywia"] = "hywia"
    structures: tuple[Literal["ffn", "attention", "heads"], ...] = Field(default=("ffn", "attention"), min_length=1)
    temperature: float = Field(default=1.0, gt=0)
    curvature: bool = True


def statistics(config: Config) -> tuple[Statistic, ...]:
    """Gradients, with their squares by sample if asked for."""
    return (Statistic("gradients", (("curvature", config.curvature), ("hidden", False))),)


def scores(model: PreTrainedModel, statistics: Vectors, config: Config) -> Scores:
    """Fused importance of every structure; float32."""
    from pruning.structures import architecture, couple

    shape = architecture(model)

    def sums(kind: str) -> Vectors:
        return {n.replace(f".{kind}.", "."): v for n, v in statistics.items() if f".{kind}." in n}

    fine = couple(sums("mixed" if config.curvature else "absolute"), shape, config.structures)
    signed = sums("signed")
    return {
        kind: [
            fuse(values, _coarse(signed, index, kind, shape), config.temperature)
            for index, values in enumerate(fine[kind])
        ]
        for kind in config.structures
    }


def _coarse(signed: Vectors, index: int, kind: str, shape: Architecture) -> Tensor:
    """|sum of w g| of each tensor's part in a structure, summed over the tensors, [structures] of one layer."""
    import torch

    from pruning.structures import ATTENTION, FFN, WRITERS

    names = {"ffn": FFN, "attention": ATTENTION, "heads": (ATTENTION[0], ATTENTION[3])}[kind]
    layer = shape.layers[index]
    count = {"ffn": layer.ffn, "attention": layer.groups, "heads": layer.groups * layer.heads}[kind]
    parts = [f"layers.{index}.{n}.{'columns' if n in WRITERS else 'rows'}" for n in names]
    return torch.stack([signed[part].view(count, -1).sum(1).abs() for part in parts]).sum(0)


def fuse(fine: Tensor, coarse: Tensor, temperature: float) -> Tensor:
    """The attention between two importances of the same structures, [units] each."""
    u, v = _standardised_log(fine), _standardised_log(coarse)
    query = (u + v) / 2
    weight = (query * (u - v) / temperature).sigmoid()  # the softmax of two logits
    return (weight * u + (1 - weight) * v).float()


def _standardised_log(values: Tensor) -> Tensor:
    values = values.double()
    logs = (values + 1e-12 * values.max()).clamp(min=1e-300).log()
    return (logs - logs.mean()) / logs.std(correction=0).clamp(min=1e-12)

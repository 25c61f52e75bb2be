"""Intrinsic dimension of a model's residual streams on training rows: how many directions hidden states really vary in.

TwoNN (Facco et al. 2017, doi 10.1038/s41598-017-11873-y): for points spread evenly over a d-dimensional surface the
ratio mu of a point's second to its first neighbour's distance has the distribution F(mu) = 1 - mu^-d, whatever the
space around it. d is the slope through the origin of -log(1 - F) against log mu; the largest tenth of the ratios, where
the estimate is worst, is left out as in the original.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recovery.base import generator_of
from recovery.data import Row
from recovery.loss import decoded

USED = 0.9  # share of the ratios that is fitted
LEAST = 10  # distinct points an estimate is made from
PARTS = 2  # samples the tokens are split into, whose estimates tell how sure they are


def two_nn(points: Tensor) -> float:
    """The intrinsic dimension of points [n, width]; equal ones count once. Raises ValueError where it has none."""
    distinct = torch.unique(points.double(), dim=0)
    if len(distinct) < LEAST:
        raise ValueError(
            f"{len(distinct)} distinct hidden states tell no dimension, {LEAST} are needed: give more data"
        )
    distinct = distinct - distinct.mean(dim=0)
    nearest = torch.cdist(distinct, distinct).topk(3, largest=False).values  # itself, first and second neighbour
    ratios = (nearest[:, 2] / nearest[:, 1]).log().sort().values
    share = torch.arange(1, len(ratios) + 1, dtype=torch.float64, device=ratios.device) / len(ratios)
    used = int(USED * len(ratios))
    x, y = ratios[:used], -torch.log1p(-share[:used])
    if not float(x @ x):
        raise ValueError("hidden states have neighbours that are all equally far: they have no dimension")
    return float((x @ y) / (x @ x))


def depth(model: PreTrainedModel) -> int:
    """How many decoder layers a model has."""
    decoder: Any = model.get_decoder()
    return len(decoder.layers)


@torch.no_grad()
def of_streams(model: PreTrainedModel, rows: Iterable[Row], tokens: int, seed: int) -> list[list[float]]:
    """[layers + 1][PARTS]: the dimension of the residual stream before the first decoder layer and after each, by two
    halves of `tokens` random tokens of the first rows. A token after the same beginning counts once.

    Raises ValueError where the rows hold too few.
    """
    model.eval()
    decoder: Any = model.get_decoder()
    modules: list[nn.Module] = [decoder.embed_tokens, *decoder.layers]
    streams: list[list[Tensor]] = [[] for _ in modules]
    chosen: list[int] = []

    def take(number: int, module: nn.Module, arguments: Any, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        streams[number].append(hidden[0, chosen].cpu())

    hooks = [module.register_forward_hook(partial(take, number)) for number, module in enumerate(modules)]
    try:
        seen, found = set[tuple[int, ...]](), 0
        for row in rows:
            chosen[:] = _new(row, seen)
            decoded(model, row)
            found += len(chosen)
            if found >= tokens:
                break
    finally:
        for hook in hooks:
            hook.remove()
    order = torch.randperm(found, generator=generator_of(seed, "dimension"))[:tokens]
    parts = order.chunk(PARTS)
    device = model.device if model.device.type == "cuda" else "cpu"
    return [[two_nn(torch.cat(stream)[part].to(device)) for part in parts] for stream in streams]


def _new(row: Row, seen: set[tuple[int, ...]]) -> list[int]:
    """The places of a row whose token, with all before it in its example, was not seen yet."""
    places: list[int] = []
    for place, position in enumerate(row.positions):
        beginning = tuple(row.ids[place - position : place + 1])
        if beginning not in seen:
            seen.add(beginning)
            places.append(place)
    return places

"""Pruning: measure, score, allocate, cut, compensate."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning import criteria
from pruning.allocation import allocate, keep_all, keep_layers, lowest_layers, refuse_out_of_reach, standardise
from pruning.architecture import Architecture
from pruning.compensation import cut_with
from pruning.config import PruningConfig
from pruning.statistics import measure
from pruning.structures import Kept, KeptLayer, Scores, Vectors, architecture, count_parameters
from pruning.surgery import target
from pruning.widths import plan_shapes

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class PruneResult:
    """`kept`: what stayed, in the numbering of the model of shape `original`.

    `report`: parameters before and after, the ratio asked and reached, and the shape of each layer.
    """

    model: PreTrainedModel
    kept: Kept
    original: Architecture
    report: dict[str, Any]


def prune(
    model: PreTrainedModel,
    input_ids: Tensor | None,
    config: PruningConfig,
    statistics: Vectors | None = None,
    compensation_ids: Tensor | None = None,
    progress: Progress = lambda done, total, note: None,
    again: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model,
) -> PruneResult:
    """Remove `config.ratio` of the model's parameters by the criterion that `config.method` names.

    `input_ids`: calibration tokens [samples, length], None where nothing runs on text; `statistics`: what `measure`
    found on them for `criteria.statistics(config)`, measured here if not given; `compensation_ids`: other tokens for
    the compensation; `again` places the cut model (`placement`) before each further step. Consumes `model`. Raises
    ValueError, with nothing cut, when the model is not LLaMA-like, numbers are not finite, or the ratio cannot be
    reached.
    """
    original, before, asked = architecture(model), count_parameters(model), criteria.statistics(config)
    if original.parameters() != before:
        raise ValueError(f"the model has {before} parameters where its config says {original.parameters()}")
    if input_ids is None and (config.runs_on_text or (asked and statistics is None)):
        raise ValueError(f"{config.method} needs calibration tokens")
    model.eval()
    goal, kept = round((1 - config.ratio) * before), keep_all(original)
    shape = planned = original
    for step in range(config.steps):
        model = again(model) if step else model
        if statistics is None:
            statistics = measure(model, input_ids, asked, progress)
        staying = list(range(len(shape.layers)))
        if step == 0 and config.depth:
            ranked = criteria.load(config.depth.method).scores(model, statistics, config)
            staying = lowest_layers(ranked["layers"][0], config.depth.layers, config)
        if step == 0:
            shape = planned = _start(original, staying, config, goal)
        scores = _scores(model, statistics, config, staying)
        target_now = planned.parameters() - round((planned.parameters() - goal) * (step + 1) / config.steps)
        found = allocate(planned, shape, scores, config, target_now, before, goal)
        found = Kept([_renumbered(layer, staying) for layer in found.layers], found.hidden)
        ids = input_ids if compensation_ids is None else compensation_ids
        # Between steps any class will do: heads that no stock one takes may be gone at the end.
        built = config if step + 1 == config.steps else config.model_copy(update={"shape": "free"})
        model = cut_with(model, found, built, statistics, ids, progress)
        kept, shape, statistics = _composed(kept, found), architecture(model), None
    after = count_parameters(model)
    report = {
        "parameters_before": before,
        "parameters_after": after,
        "ratio": config.ratio,
        "ratio_reached": 1 - after / before,
        "hidden": shape.hidden,
        "layers": [
            {"layer": layer.index, "ffn": size.ffn, "groups": size.groups, "heads": size.groups * size.heads}
            for layer, size in zip(kept.layers, shape.layers, strict=True)
        ],
    }
    return PruneResult(model, kept, original, report)


def foresee(said: dict[str, Any], config: PruningConfig) -> dict[str, Any]:
    """The entries of the pruned model's config, as far as sizes alone tell: under a global allocation, and where whole
    layers go by their scores, the widths stand for any that differ.

    Raises ValueError where the entries of a `config.json` alone tell that a model cannot be pruned as asked.
    """
    (name,) = said["architectures"]
    shape = Architecture.read(said)
    parameters, goal = shape.parameters(), round((1 - config.ratio) * shape.parameters())
    staying = list(range(len(shape.layers)))
    if config.depth:
        staying = lowest_layers(torch.zeros(len(staying)), config.depth.layers, config)
    left = _start(shape, staying, config, goal)
    shapes, hidden = list(left.layers), shape.hidden
    if config.allocation == "global":
        refuse_out_of_reach(left, config, goal)
        first = shapes[0]
        groups = first.groups - (first.groups > 1 and "attention" in config.structures)
        ffn = max(1, first.ffn - config.round_to) if "ffn" in config.structures else first.ffn
        shapes[0] = replace(first, ffn=ffn, groups=groups)  # layers will differ
    elif "layers" in config.structures:
        # Where layers are unlike, the smallest first: what the ratio is too low for then, it is too low for.
        sizes = torch.tensor([left.layer_parameters(each) for each in shapes])
        found = keep_layers(left, sizes, config, parameters - goal)
        staying = [layer.index for layer in found.layers]
        shapes = [shapes[index] for index in staying]
    else:
        shapes, hidden = plan_shapes(left, config, goal, parameters)
    biased, free = config.compensation.method == "bias", config.shape in ("free", "gguf")
    made, made_class = target(name, said, shapes, staying, hidden, biased, free)
    return {**made.to_dict(), "architectures": [made_class.__name__]}


def _start(original: Architecture, staying: list[int], config: PruningConfig, goal: int) -> Architecture:
    """What widths are cut from: the layers that stay, with the biases that the compensation will add.

    Raises ValueError where the layers that go alone take more than is asked, and where layers that are alike cannot be
    made of these.
    """
    alike = {
        "uniform": ("widths", {(layer.ffn, layer.groups, layer.heads) for layer in original.layers}),
        "vllm": ("numbers of heads or groups", {(layer.groups, layer.heads) for layer in original.layers}),
    }
    what, found = alike.get(config.shape, ("", set()))
    if len(found) > 1:
        raise ValueError(
            f"shape: {config.shape}: the layers have {len(found)} different {what} already, and would keep differing; "
            "set shape: free"
        )
    start = original.with_layers([original.layers[index] for index in staying])
    if config.depth and start.parameters() < goal:
        share = 1 - start.parameters() / original.parameters()
        raise ValueError(
            f"depth: layers: {config.depth.layers} takes {share:.1%} of the parameters, more than ratio: "
            f"{config.ratio}; lower one or raise the other"
        )
    return start.with_biases() if config.compensation.method == "bias" else start


def _scores(model: PreTrainedModel, statistics: Vectors, config: PruningConfig, staying: list[int]) -> Scores:
    """The criterion's scores of the layers that stay, on one scale where layers are ranked together."""
    criterion: Any = criteria.load(config.method)
    scores: Scores = criterion.scores(model, statistics, config)
    if config.allocation == "global" and not getattr(criterion, "COMPARABLE", False):
        scores = standardise(scores)
    whole = ("hidden", "layers")  # kinds with one tensor for the model
    return {kind: found if kind in whole else [found[index] for index in staying] for kind, found in scores.items()}


def _renumbered(layer: KeptLayer, staying: list[int]) -> KeptLayer:
    return KeptLayer(staying[layer.index], layer.ffn, layer.attention, layer.heads)


def _composed(first: Kept, second: Kept) -> Kept:
    """What stays after two cuts, in the numbering before the first."""
    layers = [
        KeptLayer(
            old.index,
            [old.ffn[unit] for unit in new.ffn],
            [old.attention[unit] for unit in new.attention],
            [old.heads[unit] for unit in new.heads],
        )
        for new in second.layers
        for old in [first.layers[new.index]]
    ]
    return Kept(layers, [first.hidden[channel] for channel in second.hidden])

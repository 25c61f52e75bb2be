"""The criteria: one module each, found by its file name.

A criterion module has a docstring, `VERSION`, a `Config` (a `PruningConfig`) and

    statistics(config) -> tuple[Statistic, ...]        what has to be measured on calibration text, if anything
    scores(model, statistics, config) -> Scores        a float32 score for every structure of each asked kind

Higher means keep. Scores come from the model's weights and the measured numbers alone, without a forward pass, and
leave the model as it was. `COMPARABLE = True` says that scores of different layers and kinds are on one scale already,
so that a global allocation does not standardise them. Importing a criterion costs no torch.
"""

import pkgutil
from importlib import import_module
from types import ModuleType

from pruning.config import PruningConfig, Statistic


def names() -> list[str]:
    """Every criterion, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of a criterion; `name` is one of `names()`."""
    return import_module(f"{__name__}.{name}")


def statistics(config: PruningConfig) -> tuple[Statistic, ...]:
    """All that a config's criterion, depth criterion and compensation need, each once."""
    asked: list[Statistic] = [*load(config.method).statistics(config)]
    if config.depth:
        asked += load(config.depth.method).statistics(None)
    if config.compensation.method == "bias":
        asked.append(Statistic("activations"))
    return tuple(dict.fromkeys(asked))

"""Which linear layers an adapter goes on, by their names. Costs no torch."""

from collections.abc import Collection

from recovery.base import AdapterConfig, fits

# Of one layer of every architecture that regrow serves.
LINEAR = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def expected(layers: int) -> list[str]:
    """The names of a model's linear layers before any layer is pruned away."""
    return [f"model.layers.{number}.{name}" for number in range(layers) for name in LINEAR]


def chosen(names: Collection[str], config: AdapterConfig) -> list[str]:
    """Those of `names` that the config asks for, in their order.

    Raises ValueError for a target or a pattern that fits none.
    """
    found = list(names)
    if config.targets != "all-linear":
        for target in config.targets:
            if not any(fits(name, target) for name in names):
                raise ValueError(f"targets: no linear layer is called {target!r}; there are {_ends(names)}")
        found = [name for name in names if any(fits(name, target) for target in config.targets)]
    for option, patterns in config.patterns().items():
        for pattern in patterns:
            if not any(fits(name, pattern) for name in found):
                raise ValueError(f"{option}: no adapted layer's name ends in {pattern!r}; adapted are {_ends(found)}")
    return found


def _ends(names: Collection[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))

"""The contract of an adapter: a trainable delta on a frozen linear layer y = W x (+ b), W [out, in].

A method computes with tensors it keeps in three named groups (`Tensors`), its layer's own and those all layers share:

* `trainable`, float32: what the optimizer changes; saved.
* `kept`: frozen, or changed by the method's own hooks (factors of a decomposition, masks, averages); saved.
* `bases`: frozen and random: rebuilt from the seed, checked by digest, never saved.

`recovery.inject` registers the groups on the model, moves them, applies dropout, and hands the method its
layer's weight. Shapes are fixed when the adapter is attached: a method whose rank grows keeps the largest and a mask.
Nothing here imports torch before a tensor is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, Field, field_validator, model_validator

if TYPE_CHECKING:
    from torch import Generator, Tensor, dtype
    from transformers import PreTrainedModel

    from recovery.data import Row


PATTERNS = ("rank_pattern", "alpha_pattern")  # options that set single layers apart, where a method has them


class AdapterConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Base of every adapter's `Config`."""

    learning_rate: ClassVar[float] = 2e-3  # what few trials favour (docs/results.md)
    without_patterns: ClassVar[str] = ""  # why the method has no rank or alpha of single layers, where it has none
    method: str
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default="all-linear", description="all linear layers of the decoder, or these (q_proj, mlp.up_proj, ...)"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on the adapter's input only, while training")

    @field_validator("targets", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all-linear":
            raise ValueError(f"{value!r} is neither all-linear nor a list of names: write [{value}]")
        return value

    @model_validator(mode="before")
    @classmethod
    def _patterned(cls, said: Any) -> Any:
        for option in PATTERNS:
            if isinstance(said, dict) and option in said and option not in cls.model_fields:
                raise ValueError(f"{option}: {cls.without_patterns}; leave it out")
        return said

    def default_rate(self) -> float:
        """The learning rate of a recovery that names none."""
        return self.learning_rate

    def patterns(self) -> dict[str, tuple[str, ...]]:
        """Options that speak of some layers only, and the patterns they give; each must fit an adapted layer."""
        return {option: tuple(getattr(self, option)) for option in PATTERNS if option in type(self).model_fields}

    def few_bits_refusal(self) -> str | None:
        """Why a base of few bits (`recovery.quantized`) is of no use to this method, or None."""
        return None


C = TypeVar("C", bound=AdapterConfig)
N = TypeVar("N", int, float)
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]


@dataclass
class Tensors:
    """Named tensors of one layer's adapter, or those that all layers share."""

    trainable: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    bases: dict[str, Tensor] = field(default_factory=dict)
    rounded: dict[str, tuple[int, Tensor]] = field(default_factory=dict)  # what `base` made, of which version of a base

    def base(self, name: str, kind: dtype) -> Tensor:
        """A base in another dtype, kept until the base changes or moves: every layer asks for it in every pass."""
        from torch import inference_mode

        exact = self.bases[name]
        if exact.dtype == kind:
            return exact
        version = exact._version  # pyright: ignore[reportPrivateUsage]
        known = self.rounded.get(name)
        if known is None or known[0] != version or known[1].dtype != kind:
            with inference_mode(False):  # what is rounded while scoring may be trained with
                known = self.rounded[name] = (version, exact.to(kind))
        return known[1]


@dataclass(frozen=True)
class Layer:
    """What one layer's adapter is built from. `seed` is the layer's own: from the run's seed and the layer's name."""

    name: str  # as in the model, "model.layers.0.self_attn.q_proj"
    weight: Tensor  # [out, in], frozen, any floating dtype
    seed: int
    head_size: int = 0  # channels of one attention head of the model

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]


class Adapter(Tensors, Generic[C]):
    """One layer's adapter. A method fills `trainable` (and `kept`, `bases`) in `__init__` and defines `delta`.

    `forward` may be cheaper than a product with `delta`, and must equal it.
    """

    undecayed: tuple[str, ...] = ()  # trained tensors that weight decay leaves alone
    whole_weights = False  # whether training needs `step`, which cannot be had where weights are sharded

    def __init__(self, config: C, layer: Layer, shared: Tensors) -> None:
        super().__init__()
        self.config = config
        self.shared = shared

    @classmethod
    def fit(cls, config: C, model: PreTrainedModel, rows: Iterable[Row], seed: int) -> tuple[C, dict[str, Any]]:
        """The config to attach with, after a look at the model and the run's rows, and what to report of that.

        Called once before training; what it returns is saved with checkpoints and adapter.
        """
        return config, {}

    @classmethod
    def share(cls, config: C, layers: list[Layer], seed: int) -> Tensors:
        """The tensors that all layers share, from every layer that will be adapted. None by default."""
        return Tensors()

    def delta(self, weight: Tensor) -> Tensor:
        """float32 [out, in]: what merging adds to the frozen weight."""
        raise NotImplementedError

    def frozen(self, weight: Tensor) -> Tensor:
        """The frozen weight [out, in] as a pass multiplies by it; outside of `step`, itself."""
        return weight

    def forward(self, x: Tensor, weight: Tensor, product: Tensor | None) -> Tensor:
        """What is added to the layer's output, in x's dtype: x W'^T - x W^T.

        x [..., in] has been through dropout; `product` is x W^T where it is known already (where nothing was dropped).
        """
        return x @ self.delta(weight).to(x.dtype).T

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The whole layer where nothing is dropped: x W'^T + b, in x's dtype.

        By default the frozen product and `forward`; a method that needs fewer products says how.
        """
        from recovery.products import linear

        product = linear(x, weight)
        output = product + self.forward(x, weight, product)
        return output if bias is None else output + bias

    @classmethod
    def step(cls, layers: Mapping[str, Adapter[Any]], tokens: int, passes: int) -> AbstractContextManager[None]:
        """Surrounds the forward and backward passes of one optimizer step, of `tokens` in all.

        The parameters do not change inside, and their gradients are whole when it ends: a method may share what it
        computes between the passes.
        """
        return nullcontext()

    @classmethod
    def after_step(cls, layers: Mapping[str, Adapter[Any]], share: float) -> None:
        """Called without autograd after every optimizer step, gradients still in place; `share` of the budget is fed,
        all of it (1.0) with the last step.

        May change `trainable` and `kept` in place (a proximal step, growing a rank).
        """

    @classmethod
    def finish(cls, layers: Mapping[str, Adapter[Any]]) -> None:
        """Called without autograd once, after training, on the adapters that will be saved."""


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern (`q_proj`, `mlp.up_proj`, `layers.0.mlp.up_proj`) is a layer's name or the end of it."""
    return f".{name}".endswith(f".{pattern}")


def of_pattern(name: str, patterns: Mapping[str, N], default: N) -> N:
    """The number of the longest pattern that fits a layer's name, or the default."""
    return max(((len(p), number) for p, number in patterns.items() if fits(name, p)), default=(0, default))[1]


def random_uniform(shape: tuple[int, ...], bound: float, generator: Generator) -> Tensor:
    """float32 on the CPU, uniform in +-bound: the same numbers whatever device the model is on."""
    import torch

    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def random_normal(shape: tuple[int, ...], deviation: float, generator: Generator) -> Tensor:
    """float32 on the CPU, normal with mean 0: the same numbers whatever device the model is on."""
    import torch

    return torch.empty(shape, dtype=torch.float32).normal_(0.0, deviation, generator=generator)


def zeros(*shape: int) -> Tensor:
    """float32 zeros on the CPU."""
    import torch

    return torch.zeros(shape, dtype=torch.float32)


def generator_of(*parts: object) -> Generator:
    """A private generator on the CPU, seeded by `seed_of(*parts)`."""
    import torch

    return torch.Generator().manual_seed(seed_of(*parts))


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any printable parts, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and float32 bytes: how rebuilt bases are told from other ones."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().float().cpu().contiguous()
        total.update(f"{name}{tuple(tensor.shape)}".encode())
        total.update(tensor.numpy().data)
    return total.hexdigest()

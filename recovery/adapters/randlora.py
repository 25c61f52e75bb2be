"""RandLoRA: a full-rank delta from fixed random bases, of which only scales are trained.

Paper: arXiv 2502.00987. With dmin and dmax the smaller and larger side of W and n = ceil(dmin / rank),

    dW = s * sum over b = 1..n of  B_b Lambda_b A Gamma_b      [dmax, dmin], transposed when in > out

A [rank, dmin] and B_b [dmax, rank] are frozen, shared by all layers (each takes the first rows and columns) and
rebuilt from the seed: uniform, Kaiming with a = sqrt 5, divided by their own standard deviation. Trained: lambda
[n, rank], zero at the start, and gamma [n, dmin], 1 / max(n, dmin). Rank works backwards: a smaller one means more
bases and more parameters, n (rank + dmin). s = alpha / rank / sqrt(n) with alpha = 2 rank unless given: 2 / sqrt(n),
each layer with its own n. Merge: W + dW.

`bases: sparse` and `very_sparse` draw -1, 0 and 1 instead: each sign with probability 1/6, or 1 / (2 sqrt dmin), the
paper's s = 6 and s = 2 sqrt dmin. They cost and weigh as much as dense ones here.

Ours: bases are sized by the largest dmin and dmax that occur (PEFT: by the largest in and out, which is more), and
computed with in the model's dtype. `pairing: peft` combines bases and scales in the order of PEFT and the official
code, a different function with the same distribution; adapters are exchanged with PEFT that way.

Ours, `fused`: a layer multiplies tokens by the merged weight W + dW, in W's dtype: rounded as a merged model's is. It
is formed once a step, dmax dmin^2 multiply-adds, and shared by the step's micro-batches. The gradient of the merged
weight M = dy^T x (transposed when in > out) is summed over them and brought to lambda and gamma at once:

    G_b = s A * (B_b^T M)      d lambda_b = G_b gamma_b      d gamma_b = lambda_b^T G_b      [dmax dmin^2 again]

T tokens cost 3 T dmax dmin, as when W itself trains. The sum W x + dW x, by way of the bases, costs 4 T dmax dmin +
3 T dmin^2: less when T < 2 dmax dmin / (dmax + 3 dmin); with dropout it is the only way. Kept is one copy of the
weights, B in their dtype, and one of their gradients where there are several micro-batches. Not fused, nothing of a
weight's size is kept for a layer: lambda and gamma are put between the bases again in the backward pass. Weights of
few bits need that, and sharded ones (FSDP) are never fused: every process would keep the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from recovery.base import (
    Adapter,
    AdapterConfig,
    Layer,
    PositiveFloat,
    PositiveInt,
    Tensors,
    generator_of,
    of_pattern,
    random_uniform,
)

if TYPE_CHECKING:
    from torch import Tensor, dtype

VERSION, READS = 5, 1


class Config(AdapterConfig, frozen=True):
    """RandLoRA's options."""

    method: Literal["randlora"] = "randlora"
    rank: int = Field(default=32, ge=1, description="inner size of one basis pair; smaller means more parameters")
    alpha: float | None = Field(default=None, gt=0, description="numerator of the scale; null is 2 rank, the paper's")
    rank_pattern: dict[str, PositiveInt] = Field(default={}, description="rank of the modules a pattern fits")
    alpha_pattern: dict[str, PositiveFloat] = Field(default={}, description="alpha of the modules a pattern fits")
    pairing: Literal["paper", "peft"] = Field(default="paper", description="which scale meets which basis column")
    bases: Literal["dense", "sparse", "very_sparse"] = Field(
        default="dense", description="uniform, or of -1, 0 and 1 with a third or 1 / sqrt(width) of them not 0"
    )
    fused: bool = Field(
        default=True, description="multiply by merged weights (not if sharded or with dropout); false: less memory"
    )

    def few_bits_refusal(self) -> str | None:
        return "randlora keeps a full copy of merged weights; set its `fused` to false" if self.fused else None


class Method(Adapter[Config]):
    """One layer's lambda and gamma over its part of the shared bases."""

    def __init__(self, config: Config, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.wide = layer.inputs > layer.outputs  # the delta is computed transposed
        self.smaller, self.larger = sorted((layer.outputs, layer.inputs))
        self.rank = of_pattern(layer.name, config.rank_pattern, config.rank)
        self.count = math.ceil(self.smaller / self.rank)
        alpha = 2 * self.rank if config.alpha is None else config.alpha
        self.alpha = of_pattern(layer.name, config.alpha_pattern, alpha)
        self.step_tokens: int | None = None  # of the optimizer step we are in
        self.collects, self.collected = False, cast("Tensor | None", None)  # the merged weight's gradient, float32
        self.collected_in: dtype | None = None  # what its products were computed in
        self._formed: tuple[Any, Tensor, Tensor, Tensor] | None = None  # W's place, lambda, gamma, W + dW
        self.formed_in_step = False  # W + dW, in the step we are in
        base = shared.bases["A"]
        self.trainable["lambda"] = base.new_zeros(self.count, self.rank)
        self.trainable["gamma"] = base.new_full((self.count, self.smaller), 1 / max(self.count, self.smaller))

    @classmethod
    def share(cls, config: Config, layers: list[Layer], seed: int) -> Tensors:
        """A [largest rank, largest dmin] and B [largest dmax, largest n, largest rank], float32."""
        ranks = [of_pattern(layer.name, config.rank_pattern, config.rank) for layer in layers]
        count = max(
            math.ceil(min(layer.outputs, layer.inputs) / rank) for layer, rank in zip(layers, ranks, strict=True)
        )
        rank = max(ranks)
        smaller = max(min(layer.outputs, layer.inputs) for layer in layers)
        larger = max(max(layer.outputs, layer.inputs) for layer in layers)
        generator = generator_of(seed)
        down = random_uniform((rank, smaller), 1.0, generator)
        up = random_uniform((larger, count, rank), 1.0, generator)
        if config.bases != "dense":
            filled = 1 / 3 if config.bases == "sparse" else 1 / math.sqrt(smaller)
            down, up = (basis.sign() * (basis.abs() > 1 - filled) for basis in (down, up))
            if not down.any():
                raise ValueError(f"{config.bases} bases of rank {rank} came out as zeros: take bases: dense")
        # Dividing by the standard deviation undoes any Kaiming bound, so the bound need not be put in first.
        return Tensors(bases={"A": down / down.std(), "B": up / up.std()})

    def scale(self) -> float:
        """s = alpha / rank / sqrt(n)."""
        return self.alpha / self.rank / math.sqrt(self.count)

    def _factors(self, scales: Tensor, gamma: Tensor, kind: dtype) -> tuple[Tensor, Tensor]:
        """[dmax, n rank] and s times [n rank, dmin]: the delta is their product."""
        # down[b, r, j] = lambda[b, r] * A[r, j] * gamma[b, j]
        down = (self.scale() * scales)[:, :, None] * self._down() * gamma[:, None, :]
        if self.config.pairing == "peft":
            down = down.transpose(0, 1)
        return self._up(kind), down.flatten(0, 1).to(kind)

    def _up(self, kind: dtype) -> Tensor:
        return self.shared.base("B", kind)[: self.larger, : self.count, : self.rank].flatten(1)

    def _down(self) -> Tensor:
        return self.shared.bases["A"][: self.rank, : self.smaller]

    def delta(self, weight: Tensor) -> Tensor:
        up, down = self._factors(self.trainable["lambda"], self.trainable["gamma"], self.trainable["gamma"].dtype)
        product = up @ down
        return product.T if self.wide else product

    def forward(self, x: Tensor, weight: Tensor, product: Tensor | None) -> Tensor:
        from recovery.products import between, computing

        parameters = self.trainable["lambda"], self.trainable["gamma"]
        scales, gamma = (parameter.detach() for parameter in parameters)
        kind = computing(x)
        return between(x, lambda: self._factors(scales, gamma, kind), self.wide, self._of_down, *parameters)

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from recovery.products import merged

        if not self._merges(x, weight):
            return super().output(x, weight, bias)
        parameters = self.trainable["lambda"], self.trainable["gamma"]
        return merged(x, self._merged(weight), bias, self._gradients, *parameters)

    @classmethod
    @contextmanager
    def step(cls, layers: Mapping[str, Adapter[Any]], tokens: int, passes: int) -> Generator[None]:
        methods = cast("Mapping[str, Method]", layers).values()
        for method in methods:
            method.step_tokens, method.collects, method.formed_in_step = tokens, passes > 1, False
        try:
            yield
            for method in methods:
                method._settle()
        finally:
            for method in methods:
                method.step_tokens, method.collected = None, None
                method.collects = method.formed_in_step = False

    def _merges(self, x: Tensor, weight: Tensor) -> bool:
        """Is the merged weight the cheaper way? What was computed before plays no part: a resumed run goes the same."""
        from torch import is_grad_enabled

        from recovery import parallel

        if not self.config.fused or parallel.sharded() or not weight.is_floating_point():
            return False
        tokens = self.step_tokens or x.numel() // x.shape[-1]
        cheaper = tokens * (self.larger + 3 * self.smaller) > 2 * self.larger * self.smaller
        return cheaper or not is_grad_enabled()  # without gradients it is formed once for many calls

    def _merged(self, weight: Tensor) -> Tensor:
        """W + dW in W's dtype; formed again when lambda, gamma or W are not what they were (W: but through `.data`)."""
        from torch import inference_mode

        from recovery.products import computing

        scales, gamma = self.trainable["lambda"].detach(), self.trainable["gamma"].detach()
        place = (weight.data_ptr(), weight._version, weight.dtype, weight.device)  # pyright: ignore[reportPrivateUsage]
        known = self._formed
        # Within a step lambda and gamma stay. Elsewhere they are compared by value, for which a GPU is waited for:
        # versions of tensors do not see what is written through `.data`.
        if known is not None and known[0] == place:
            stepping = self.step_tokens is not None
            same = self.formed_in_step if stepping else known[1].equal(scales) and known[2].equal(gamma)
            if same:
                return known[3]
        self._formed = known = None  # the old one goes before the new one comes
        with inference_mode(False):  # what is formed while scoring may be trained with
            up, down = self._factors(scales, gamma, computing(weight))
            frozen = weight.detach().to(up.dtype)
            formed = frozen.addmm(down.T, up.T) if self.wide else frozen.addmm(up, down)
            self._formed = (place, scales.clone(), gamma.clone(), formed.to(weight.dtype))
            self.formed_in_step = self.step_tokens is not None
        return self._formed[3]

    def _gradients(self, dy: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of lambda and gamma, from dy [tokens, out] and x [tokens, in]; None while they are collected."""
        from recovery.products import transposed_product

        if not self.collects:
            return self._reduced(transposed_product(dy, x))
        if self.collected is None:
            # In float32: 16 bits would lose what later micro-batches add.
            self.collected, self.collected_in = transposed_product(dy, x).float(), dy.dtype
        elif dy.dtype == self.collected.dtype:
            self.collected.addmm_(dy.T, x)
        else:
            self.collected += transposed_product(dy, x)
        return None, None

    def _reduced(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """From the merged weight's gradient [out, in] to those of lambda [n, rank] and gamma [n, dmin], float32."""
        from recovery.products import transposed_product

        return self._of_down(transposed_product(self._up(gradient.dtype), gradient.T if self.wide else gradient))

    def _of_down(self, product: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of the factor with lambda and gamma in it [n rank, dmin] to theirs."""
        if self.config.pairing == "peft":
            parts = product.unflatten(0, (self.rank, self.count)).transpose(0, 1)
        else:
            parts = product.unflatten(0, (self.count, self.rank))
        parts = parts.float().mul_(self.scale() * self._down())  # [n, rank, dmin]
        scales, gamma = self.trainable["lambda"].detach(), self.trainable["gamma"].detach()
        return (parts @ gamma[:, :, None]).squeeze(2), (scales[:, None] @ parts).squeeze(1)

    def _settle(self) -> None:
        """Give lambda and gamma the gradients that were collected."""
        if self.collected is None:
            return
        parameters = self.trainable["lambda"], self.trainable["gamma"]
        for parameter, gradient in zip(parameters, self._reduced(self.collected.to(self.collected_in)), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self.collected = None

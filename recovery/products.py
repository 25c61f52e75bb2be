"""Products of tokens with weights, as autograd functions that keep and repeat as little as they can.

All take x [..., in] and give [..., out] in x's dtype. `computing` says what they compute in: float32 for bfloat16 on
processors that multiply float32 faster (x86 without AMX; AVX-512's bfloat16 is half as fast there on Intel's), which
is also more exact; elsewhere x's own dtype. Frozen weights get no gradient, biases are frozen.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Gradients = Callable[[Tensor, Tensor], tuple[Tensor | None, ...]]
Factors = Callable[[], tuple[Tensor, Tensor]]
WIDE = 1024  # from which on `transposed_product` gains by its copy (AMX, torch 2.13; docs/results.md)


@cache
def slow_bfloat16() -> bool:
    """Does this processor multiply float32 matrices faster than bfloat16 ones?"""
    able: Any = getattr(torch.cpu, "get_capabilities", dict)()
    if able.get("architecture") != "x86_64" or able.get("amx_bf16"):
        return False
    return not able.get("avx512_bf16") or "Intel" in able.get("cpu_name", "")


def computing(tensor: Tensor) -> torch.dtype:
    """The dtype in which products with `tensor` are computed."""
    slow = tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and slow_bfloat16()
    return torch.float32 if slow else tensor.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with a frozen weight [out, in]."""
    if computing(x) == x.dtype:
        return torch.nn.functional.linear(x, weight, bias)
    return _Frozen.apply(x, weight, bias)  # type: ignore[no-any-return]


def through(layer: Any, x: Tensor) -> Tensor:
    """A frozen linear layer's output, by its own forward pass where that is as fast."""
    return layer(x) if computing(x) == x.dtype else linear(x, layer.weight, layer.bias)


def low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    """x W^T + b + (x down^T) up^T with a frozen weight; down [rank, in] and up [out, rank] are trained, float32."""
    return _LowRank.apply(x, weight, bias, down, up)  # type: ignore[no-any-return]


def merged(x: Tensor, weight: Tensor, bias: Tensor | None, gradients: Gradients, *parameters: Tensor) -> Tensor:
    """x W^T + b, where W [out, in] was formed from `parameters` outside autograd.

    `gradients` gets dy [tokens, out] and x [tokens, in] (dy^T x is the gradient of W) and gives each parameter's
    gradient, or None where it adds it up by itself.
    """
    return _Merged.apply(x, weight, bias, gradients, *parameters)  # type: ignore[no-any-return]


def between(x: Tensor, factors: Factors, wide: bool, gradients: Callable[[Tensor], Any], *parameters: Tensor) -> Tensor:
    """(x down^T) up^T, or (x up) down where `wide`. up [larger, inner] is fixed, down [inner, smaller] comes from
    `parameters`; both are formed twice instead of being kept for the backward pass.

    `gradients` gets the gradient of down and gives each parameter's.
    """
    return _Between.apply(x, factors, wide, gradients, *parameters)  # type: ignore[no-any-return]


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right [m, n] of left [rows, m] and right [rows, n], as in a weight's gradient dy^T x.

    With AMX bfloat16 takes up to 2.3 times as long when the left factor is a transposed view and a side is wide, so the
    narrower factor is copied in transposed order first.
    """
    if left.device.type != "cpu" or left.dtype != torch.bfloat16 or max(left.shape[1], right.shape[1]) < WIDE:
        return left.T @ right
    if left.shape[1] <= right.shape[1]:
        return left.T.contiguous() @ right
    return (right.T.contiguous() @ left).T


def _product(rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows matrix^T + b for 2-d rows, in the rows' dtype."""
    return torch.nn.functional.linear(rows, matrix.to(rows.dtype), None if bias is None else bias.to(rows.dtype))


def _rows(tensor: Tensor) -> Tensor:
    """2-d, in the dtype that is computed in."""
    return tensor.reshape(-1, tensor.shape[-1]).to(computing(tensor))


class _Frozen(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(_rows(x), weight, bias).to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # type: ignore[override]
        (weight,), (dy,) = ctx.saved_tensors, grad_outputs
        return _product(_rows(dy), weight.T).to(dy.dtype).unflatten(0, dy.shape[:-1]), None, None


class _LowRank(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        rows = _rows(x)
        inner = _product(rows, down)
        ctx.save_for_backward(x, weight, down, up, inner)
        return _product(rows, weight, bias).addmm_(inner, up.T.to(rows.dtype)).to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # type: ignore[override]
        x, weight, down, up, inner = ctx.saved_tensors
        rows, dx = _rows(grad_outputs[0]), None
        d_inner = _product(rows, up.T)
        if ctx.needs_input_grad[0]:
            dx = _product(rows, weight.T).addmm_(d_inner, down.to(rows.dtype)).to(x.dtype).view_as(x)
        return dx, None, None, (d_inner.T @ _rows(x)).to(down.dtype), (rows.T @ inner).to(up.dtype)


class _Merged(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gradients: Gradients, *parameters: Tensor
    ) -> Tensor:
        # The parameters are saved so that autograd refuses a backward pass after they were changed.
        ctx.save_for_backward(x, weight, *parameters)
        ctx.gradients = gradients
        return _product(_rows(x), weight, bias).to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # type: ignore[override]
        x, weight, *_ = ctx.saved_tensors
        rows = _rows(grad_outputs[0])
        dx = _product(rows, weight.T).to(x.dtype).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *ctx.gradients(rows, _rows(x))


class _Between(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factors: Factors, wide: bool, gradients: Callable[[Tensor], Any], *parameters: Tensor
    ) -> Tensor:
        up, down = factors()
        inner = _product(_rows(x), up.T if wide else down)
        ctx.save_for_backward(inner if wide else x, *parameters)  # what down was multiplied with
        ctx.factors, ctx.wide, ctx.gradients, ctx.like = factors, wide, gradients, (x.shape, x.dtype)
        return _product(inner, down.T if wide else up).to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # type: ignore[override]
        met, *_ = ctx.saved_tensors
        (up, down), rows, dx = ctx.factors(), _rows(grad_outputs[0]), None
        shape, dtype = ctx.like
        d_inner = _product(rows, down if ctx.wide else up.T)
        if ctx.needs_input_grad[0]:
            dx = _product(d_inner, up if ctx.wide else down.T).to(dtype).view(shape)
        gradient = transposed_product(met, rows) if ctx.wide else transposed_product(d_inner, _rows(met))
        return dx, None, None, None, *ctx.gradients(gradient)

"""A frozen base in 4 or 8 bits: adapters train beside weights that are kept as bitsandbytes' codes and scales.

Paper: QLoRA, arXiv 2305.14314. `nf4`: 16 levels at the quantiles of a normal distribution, times the largest magnitude
of each block of 64 weights, float32 (4.5 bits a weight; the paper's second quantization, of the scales, is left out).
`int8`: round(127 W / largest magnitude of the row), as in LLM.int8(), arXiv 2208.07339, without its outliers:
activations stay as they are. Embedding, norms, biases and lm_head stay in the model's dtype.

Ours: a layer's weights are unpacked, in the model's dtype, for each product and again in its backward pass, and then
multiplied as any weights are. bitsandbytes' own layers are not used: they repack their weights in eval mode on some
processors, and fail on odd widths. Blocks run over the ends of rows, and the last one is filled with zeros, so every
shape is served. The adapter is attached before: its start, its magnitudes (DoRA's) and the sample by which it knows
its base are those of the full weights, into which it is merged.
"""

import importlib
import importlib.util
import logging
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from recovery import parallel

BLOCK = 64  # weights of nf4 that share a scale
PACKED = ("codes", "scales")
aten = torch.ops.aten


class FewBits(Tensor):
    """A weight [out, in], or its transpose, that is kept in few bits and unpacked by whatever computes with it.

    `codes`: nf4 uint8 [blocks * 32, 1], two weights each; int8 [out, in]. `scales`: float32, one a block or a row.
    Its dtype is the one it is unpacked to. Moving and transposing keep it packed, and so does autograd, which saves
    it for the backward pass as it is.
    """

    codes: Tensor
    scales: Tensor
    turned: bool  # transposed

    def __new__(
        cls, codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype, turned: bool
    ) -> "FewBits":
        make: Any = torch.Tensor._make_wrapper_subclass  # pyright: ignore[reportPrivateUsage]
        made: FewBits = make(cls, shape, dtype=dtype, device=codes.device)
        made.codes, made.scales, made.turned = codes, scales, turned
        return made

    @classmethod
    def packed(cls, weight: Tensor, scheme: str) -> "FewBits":
        """A weight [out, in] in `nf4` or `int8`, packed where it lies."""
        kernels, values = _bitsandbytes(), weight.detach()
        if scheme == "int8":
            codes, scales, _ = kernels.int8_vectorwise_quant(values.half())
        else:
            blocks = nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
            codes, state = kernels.quantize_4bit(blocks, blocksize=BLOCK, quant_type="nf4")
            scales = state.absmax
        return cls(codes, scales, tuple(weight.shape), weight.dtype, False)

    def unpacked(self) -> Tensor:
        """The weight as an ordinary tensor of its dtype."""
        shape, kernels = self.shape[::-1] if self.turned else self.shape, _bitsandbytes()
        if self.codes.dtype == torch.int8:
            values = kernels.int8_vectorwise_dequant(self.codes, self.scales).to(self.dtype)
        else:
            how = {"shape": (len(self.scales), BLOCK), "dtype": self.dtype, "blocksize": BLOCK, "quant_type": "nf4"}
            blocks = kernels.dequantize_4bit(self.codes, kernels.QuantState(self.scales, **how))
            values = blocks.flatten()[: shape.numel()].view(shape)
        return values.T if self.turned else values

    def stored_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def __tensor_flatten__(self) -> tuple[list[str], Any]:  # by this, modules know how to move such a parameter
        return list(PACKED), (self.dtype, self.turned)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> "FewBits":
        return cls(inner["codes"], inner["scales"], tuple(size), *context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.detach.default:
            return args[0]._again()
        if func is aten.t.default or (func is aten.permute.default and [dim % 2 for dim in args[1]] == [1, 0]):
            return args[0]._again(turn=True)
        if func is aten._to_copy.default and kwargs.get("dtype", args[0].dtype) == args[0].dtype:
            return args[0]._again(kwargs.get("device"))
        args, kwargs = tree_map_only(FewBits, FewBits.unpacked, (args, kwargs))
        return func(*args, **kwargs)

    def _again(self, device: torch.device | None = None, turn: bool = False) -> "FewBits":
        codes, scales = (getattr(self, name).to(device or self.device) for name in PACKED)
        shape = self.shape[::-1] if turn else self.shape
        return FewBits(codes, scales, tuple(shape), self.dtype, self.turned != turn)


def refusal() -> str | None:
    """Why no base can be quantized here, or None."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "needs bitsandbytes: pip install 'regrow[quantized]'"
    if parallel.sharded():
        return "weights of few bits are not split over processes: launch without FSDP, or leave it out"
    return None


@torch.no_grad()
def quantize(model: PreTrainedModel, scheme: str, device: str | torch.device | None = None) -> dict[str, Any]:
    """Pack the weights of the decoder's linear layers, adapted or not, one by one on `device`; the rest follows there.

    Returns scheme, bytes of these weights before and after, and `rounding`, the root of the squared error over the
    squared weights. Raises ValueError where bitsandbytes is missing or weights are sharded.
    """
    if reason := refusal():
        raise ValueError(f"quantized_base: {reason}")
    before = after = 0
    error = total = 0.0
    blocks: Any = model.get_decoder().layers
    for linear in [module for module in blocks.modules() if isinstance(module, nn.Linear)]:
        weight = linear.weight.detach().to(device or linear.weight.device)
        packed = FewBits.packed(weight, scheme)
        before, after = before + weight.nbytes, after + packed.stored_bytes()
        error += float((packed.unpacked().float() - weight.float()).square().sum())
        total += float(weight.float().square().sum())
        linear.weight = nn.Parameter(packed, requires_grad=False)
    if device is not None:
        cast("nn.Module", model).to(device)
    return {"scheme": scheme, "bytes": after, "bytes_before": before, "rounding": round((error / total) ** 0.5, 5)}


def _bitsandbytes() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says of every process what it could not load
    return importlib.import_module("bitsandbytes.functional")

"""Cutting: slice the kept structures out of the weights, and build the smaller model that holds them.

Removing hidden channels changes what an RMSNorm divides by: with d channels cut to d', the norm's weight times
sqrt(d / d') and epsilon times d / d' give exactly what the dense model gives when those channels are zero. But for
Qwen3: its norms over the head dimension read the same entry of the config and get the larger epsilon, too, which at
1e-6 moves logits by less than a ten-thousandth.
"""

import math
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from pruning.architecture import LayerShape
from pruning.modeling_regrow import (
    RegrowForCausalLM,
    RegrowMistralForCausalLM,
    RegrowQwen2ForCausalLM,
    RegrowQwen3ForCausalLM,
)
from pruning.resident import give_back
from pruning.structures import ATTENTION, FFN, NORMS, Kept, KeptLayer, architecture, decoder_layers

_NAMES = ("model_type", "architectures", "auto_map", "per_layer_config")  # entries that are the old model's alone
# Every family's class of layers that are alike, and ours of layers that differ.
FAMILIES: tuple[tuple[type[PreTrainedModel], type[PreTrainedModel]], ...] = (
    (LlamaForCausalLM, RegrowForCausalLM),
    (MistralForCausalLM, RegrowMistralForCausalLM),
    (Qwen2ForCausalLM, RegrowQwen2ForCausalLM),
    (Qwen3ForCausalLM, RegrowQwen3ForCausalLM),
)


def target(
    name: str,
    said: dict[str, Any],
    shapes: list[LayerShape],
    staying: list[int],
    hidden: int,
    biased: bool = False,
    free: bool = False,
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """Config and class of what is left of a model of class `name` and config entries `said`.

    `shapes` of the layers `staying`; `biased`: o_proj and down_proj get a bias; `free`: a class that stock transformers
    does not have will do. It is the family's stock class where that can hold the shape, Mistral's where Llama's config
    refuses the head count, and the family's own of `FAMILIES` for layers that differ. Raises ValueError when no class
    can.
    """
    old_hidden = said["hidden_size"]
    head_dim = said.get("head_dim") or old_hidden // said["num_attention_heads"]
    said = {key: value for key, value in said.items() if key not in _NAMES}
    layers = [
        {
            "num_attention_heads": shape.groups * shape.heads,
            "num_key_value_heads": shape.groups,
            "intermediate_size": shape.ffn,
        }
        for shape in shapes
    ]
    said |= {"head_dim": head_dim, "num_hidden_layers": len(layers), "hidden_size": hidden}
    if said.get("layer_types"):
        said["layer_types"] = [said["layer_types"][index] for index in staying]
    if said.get("max_window_layers"):
        said["max_window_layers"] = min(said["max_window_layers"], len(layers))
    if hidden < old_hidden:
        said["rms_norm_eps"] *= old_hidden / hidden
    stock, own = next(pair for pair in FAMILIES if name in (made.__name__ for made in pair))
    if biased:
        if stock is not LlamaForCausalLM:
            raise ValueError(f"compensation: bias: {name} has no bias on o_proj and down_proj; use least_squares")
        said |= {"attention_bias": True, "mlp_bias": True}
    said |= {key: max(layer[key] for layer in layers) for key in layers[0]}
    widths = {"per_layer_config": {str(index): layer for index, layer in enumerate(layers)}}
    if any(layer != layers[0] for layer in layers):
        windowed = 0 < (said.get("sliding_window") or 0) < said["max_position_embeddings"]
        if not (free or stock is LlamaForCausalLM or (stock is MistralForCausalLM and not windowed)):
            raise ValueError(
                f"shape: {name}: the layers of different widths that vLLM knows are Llama's, without a window, norms "
                "of q and k, or biases of q, k and v alone; set shape: free, or uniform"
            )
        return _config(own, said | widths), own
    if stock is not LlamaForCausalLM or not hidden % said["num_attention_heads"]:
        return _config(stock, said), stock
    if said.get("attention_bias") or said.get("mlp_bias"):
        if free:
            return _config(own, said | widths), own
        raise ValueError(
            f"{said['num_attention_heads']} heads do not divide {hidden}, as LlamaConfig wants, and Mistral "
            "has no biases; set structures: [ffn], another ratio, compensation: least_squares, or shape: free"
        )
    # Mistral's config does not ask for divisibility; without a window its model computes what Llama's does.
    said = {key: value for key, value in said.items() if not key.endswith("_bias")}
    return _config(MistralForCausalLM, said | {"sliding_window": None}), MistralForCausalLM


def _config(model_class: type[PreTrainedModel], said: dict[str, Any]) -> PreTrainedConfig:
    made: Any = model_class.config_class
    return made(**said)


class Cutter:
    """Slices a model in place, layer by layer, so that no more than one projection exists twice, and assembles the
    smaller one. `kept` is everything that stays; `hidden` is None where the residual stream keeps its channels."""

    def __init__(self, model: PreTrainedModel, kept: Kept, biased: bool = False, free: bool = True):
        self.model, self.kept = model, kept
        shapes, staying = [layer.shape for layer in kept.layers], [layer.index for layer in kept.layers]
        said = model.config.to_dict()
        self.config, self.model_class = target(
            type(model).__name__, said, shapes, staying, len(kept.hidden), biased, free
        )
        shape = architecture(model)
        self.head_dim, self.biased = shape.head_dim, biased
        full = len(kept.hidden) == shape.hidden
        self.hidden = None if full else torch.tensor(kept.hidden)
        self.norm_scale = math.sqrt(shape.hidden / len(kept.hidden))

    def cut_ends(self) -> None:
        """Embedding, head and last norm; nothing to do while the residual stream keeps its channels."""
        if self.hidden is None:
            return
        embedding: Any = self.model.get_input_embeddings()
        head: Any = self.model.get_output_embeddings()
        decoder: Any = self.model.get_decoder()
        tied = head.weight is embedding.weight
        embedding.weight = _taken(embedding.weight, 1, self.hidden)
        embedding.embedding_dim = len(self.hidden)
        head.weight = embedding.weight if tied else _taken(head.weight, 1, self.hidden)
        head.in_features = len(self.hidden)
        self._cut_norm(decoder.norm)

    def cut_layer(self, layer: nn.Module, keep: KeptLayer) -> None:
        """One decoder layer's projections and norms."""
        heads, groups = _blocks(keep.heads, self.head_dim), _blocks(keep.attention, self.head_dim)
        channels = torch.tensor(keep.ffn)
        outputs = (heads, groups, groups, self.hidden, channels, channels, self.hidden)
        inputs = (self.hidden, self.hidden, self.hidden, heads, self.hidden, self.hidden, channels)
        for name, rows, columns in zip((*ATTENTION, *FFN), outputs, inputs, strict=True):
            linear = layer.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            _slice(linear, rows, columns)
            if self.biased and linear.bias is None:  # pyright: ignore[reportUnnecessaryComparison]
                zero = torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)
                linear.bias = nn.Parameter(zero, requires_grad=False)
        if self.hidden is not None:
            for name in NORMS:
                self._cut_norm(layer.get_submodule(name))
        attention: Any = layer.get_submodule("self_attn")
        attention.num_key_value_groups = keep.shape.heads
        give_back()

    def assemble(self) -> PreTrainedModel:
        """The sliced weights in a model of the new class; tensors are taken over, not copied."""
        model = self.model
        decoder: Any = model.get_decoder()
        layers = [decoder.layers[layer.index] for layer in self.kept.layers]
        decoder.layers = nn.ModuleList(layers)
        self.config.dtype = model.dtype
        state = model.state_dict()
        devices = {tensor.device for tensor in state.values()}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")  # where it was spread, it is gathered
        with torch.device("meta"):
            new = self.model_class(self.config)  # pyright: ignore[reportCallIssue]
        new.load_state_dict(state, assign=True)
        new.tie_weights()
        # Rotary frequencies are not part of the state: take them over from the old model, where they are real, but not
        # what sends them where that model was placed.
        new.get_decoder().rotary_emb = remove_hook_from_module(decoder.rotary_emb, recurse=True)
        new.generation_config = model.generation_config
        if any(tensor.is_meta for tensor in (*new.parameters(), *new.buffers())):
            raise RuntimeError(f"{self.model_class.__name__}: a weight was not carried over")
        new.to(device=device)  # pyright: ignore[reportCallIssue]
        return new.eval()

    def _cut_norm(self, norm: Any) -> None:
        norm.weight = nn.Parameter(_taken(norm.weight, 0, self.hidden) * self.norm_scale, requires_grad=False)
        norm.variance_epsilon = self.config.rms_norm_eps


def cut(model: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """A new model with only the kept structures. Consumes `model`. Raises ValueError, with nothing cut, when no class
    can hold the result."""
    cutter = Cutter(model, kept)
    cutter.cut_ends()
    layers = decoder_layers(model)
    for keep in kept.layers:
        cutter.cut_layer(layers[keep.index], keep)
    return cutter.assemble()


def _blocks(units: list[int], size: int) -> Tensor:
    """Indices of whole heads: unit j owns j size .. (j + 1) size - 1."""
    return (torch.tensor(units)[:, None] * size + torch.arange(size)).flatten()


def _taken(weight: Tensor, dimension: int, indices: Tensor | None) -> nn.Parameter:
    values = weight.detach()
    if indices is not None and len(indices) < values.shape[dimension]:
        values = values.index_select(dimension, indices.to(values.device))
    return nn.Parameter(values, requires_grad=False)


def _slice(linear: nn.Linear, rows: Tensor | None, columns: Tensor | None) -> None:
    """Keep these rows and columns; None keeps all. The bias goes with the rows."""
    linear.weight = _taken(_taken(linear.weight, 0, rows), 1, columns)
    linear.out_features, linear.in_features = linear.weight.shape
    if linear.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
        linear.bias = _taken(linear.bias, 0, rows)

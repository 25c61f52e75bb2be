"""A model run one decoder layer at a time over windows of tokens, so that only one layer has to work at once.

Each layer is called with what the model itself calls it with (mask, positions, rotary tables), noted from one forward
pass over a single window; all windows have the same length, so that holds for every batch.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.memory import BATCH_TOKENS
from pruning.placement import leave, visits
from pruning.structures import decoder_layers


class Walk:
    """`batches`: token ids [samples, length], split; `layers`: the model's decoder layers."""

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, batch_tokens: int = BATCH_TOKENS):
        if input_ids.ndim != 2 or input_ids.shape[1] < 2:
            raise ValueError(f"calibration tokens have shape {list(input_ids.shape)}; [samples, length >= 2] is needed")
        self.model = model
        self.layers = decoder_layers(model)
        self.tokens = input_ids.numel()
        weights = [next(layer.parameters()) for layer in self.layers]
        # A layer that visits runs where the ends of the model are.
        self.devices = [
            model.device if visits(layer) else weight.device for layer, weight in zip(self.layers, weights, strict=True)
        ]
        self._running = 0
        self.batches = list(input_ids.to(model.device).split(max(1, batch_tokens // input_ids.shape[1])))
        self._arguments = self._note_arguments(self.batches[0][:1])
        leave(self.layers[-1])

    def embed(self) -> list[Tensor]:
        """The residual stream before the first layer, one [batch, length, d] for each batch."""
        return [self.model.get_input_embeddings()(ids) for ids in self.batches]

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """The residual stream after layer `index`."""
        self._enter(index)
        output = self.layers[index](hidden.to(self.devices[index]), **self._arguments[index])
        return output[0] if isinstance(output, tuple) else output

    def run_half(self, index: int, half: int, hidden: Tensor) -> None:
        """Run only the attention (0) or the FFN (1) of layer `index`, for whoever watches its projections."""
        self._enter(index)
        layer: Any = self.layers[index].to(self.devices[index])
        hidden = hidden.to(self.devices[index])
        if half == 0:
            layer.self_attn(hidden_states=layer.input_layernorm(hidden), **self._arguments[index])
        else:
            layer.mlp(layer.post_attention_layernorm(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits from the residual stream after the last layer."""
        model: Any = self.model
        norm, head = model.get_decoder().norm, model.get_output_embeddings()
        return head(norm(hidden.to(norm.weight.device)).to(head.weight.device)).float()

    def _enter(self, index: int) -> None:
        """The layer that ran before goes back to where it lies, whichever order the layers are run in."""
        if index != self._running:
            leave(self.layers[self._running])
            self._running = index

    def _note_arguments(self, window: Tensor) -> list[dict[str, Any]]:
        noted: list[dict[str, Any]] = [{} for _ in self.layers]

        def note(index: int):
            def hook(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
                passed = {key: value for key, value in named.items() if key != "hidden_states"}
                noted[index] = send_to_device(passed, self.devices[index])

            return hook

        hooks = [
            layer.register_forward_pre_hook(note(index), with_kwargs=True) for index, layer in enumerate(self.layers)
        ]
        try:
            with torch.no_grad():
                self.model.get_decoder()(input_ids=window, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return noted


@contextmanager
def watch(layer: nn.Module, names: tuple[str, ...]) -> Generator[dict[str, list[tuple[Any, Any]]]]:
    """Collects (input, output) of every call of these projections while it is open."""
    seen: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    hooks = [
        layer.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen[name].append((inputs[0], output))
        )
        for name in names
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()

"""Where a model's weights lie while it is pruned: on one device, over several GPUs, or on the CPU with visits.

    whole     everything on one device
    spread    layers spread evenly over all GPUs by accelerate (`infer_auto_device_map`), `HEADROOM` of each left free
    offload   decoder layers stay in CPU memory; each visits the device when it runs and leaves when another one does
              (accelerate's `CpuOffload`); embedding, head and last norm stay on the device

Pruning runs a model layer by layer (`walk`), so with `offload` the device holds one layer, the ends and the residual
streams, whatever the model's size. Hooks end with the model they were put on: what is cut from it is placed anew.
Nothing here has run on a GPU; the hooks are tested on the CPU.
"""

from typing import Any, Literal

from accelerate import cpu_offload_with_hook, dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory, get_max_memory
from torch import nn
from transformers import PreTrainedModel

from pruning.structures import decoder_layers

Placement = Literal["whole", "spread", "offload"]
HEADROOM = 0.2  # of a GPU's free memory: residual streams, and the activations and gradients of one layer


def place(model: PreTrainedModel, placement: Placement, device: str) -> PreTrainedModel:
    """Put a model that lies on the CPU where it shall work. `device` is not looked at for `spread`.

    Raises ValueError when the GPUs together are too small for the model.
    """
    if placement == "offload":
        return _offload(model, device)
    if placement == "spread":
        kept_together = [type(decoder_layers(model)[0]).__name__]
        room: dict[int | str, int | str] = {
            where: int(size * (1 - HEADROOM)) for where, size in get_max_memory().items()
        }
        places = infer_auto_device_map(model, get_balanced_memory(model, room, kept_together), kept_together)
        if outside := [name for name, where in places.items() if where in ("cpu", "disk")]:
            raise ValueError(
                f"runtime.placement: spread: {len(outside)} modules ({outside[0]}, ...) find no room on the GPUs; "
                "set it to offload"
            )
        dispatch_model(model, places)
        return model
    return model.to(device)  # pyright: ignore[reportArgumentType]


def visits(layer: nn.Module) -> bool:
    """Whether a layer lies in CPU memory and comes to the device only to run."""
    return _hook(layer) is not None


def leave(layer: nn.Module) -> None:
    """Send a visiting layer back to CPU memory."""
    if visits(layer):
        layer.to("cpu")


def _offload(model: PreTrainedModel, device: str) -> PreTrainedModel:
    layers = decoder_layers(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if id(module) not in inside and not list(module.children()):
            module.to(device)
    hooks: list[Any] = []
    for layer in layers:
        hooks.append(cpu_offload_with_hook(layer, device, hooks[-1] if hooks else None)[1])
    _hook(layers[0]).prev_module_hook = hooks[-1]  # where the last pass ended, the next one begins
    return model


def _hook(layer: nn.Module) -> Any:
    hook: Any = getattr(layer, "_hf_hook", None)
    return hook if hasattr(hook, "prev_module_hook") else None

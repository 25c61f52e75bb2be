"""Speed and size of several models side by side: prefill, decode, latency, memory, parameters, multiplications.

Models are measured in turn, the order reversed with every repeat, so that a busy machine or a warming chip slows all of
them alike; the least time of a measure counts. Tokens are made up: speed does not depend on what they say.
"""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Speed:
    """One model. `latency_seconds`: prompt and first new token of one row. `macs`: multiply-adds of its prompt pass.

    `peak_bytes`: the model's weights and what a pass adds at most to the process's (or the GPU's) memory; None where
    the system does not tell.
    """

    parameters: int
    bytes: int
    macs: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    latency_seconds: float
    peak_bytes: int | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def measure(
    models: Mapping[str, PreTrainedModel],
    prompt: int = 128,
    new: int = 32,
    batch: int = 1,
    repeats: int = 5,
    progress: Progress = lambda done, total, note: None,
) -> dict[str, Speed]:
    """Measure every model on `batch` rows of `prompt` tokens and `new` generated ones; the first round warms up.

    Raises ValueError where a window is shorter than prompt and new tokens.
    """
    for name, model in models.items():
        window = getattr(model.config, "max_position_embeddings", None)
        if window and window < prompt + new:
            raise ValueError(f"{name}: {prompt} prompt and {new} new tokens do not fit into its window of {window}")
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
    peaks: dict[str, int | None] = {}
    names = list(models)
    for repeat in range(repeats + 1):
        for place, name in enumerate(names if repeat % 2 == 0 else names[::-1]):
            model = models[name]
            if repeat == 0:
                peaks[name] = _peak(model, lambda model=model: _round(model, prompt, new, batch))
            else:
                times[name].append(_round(model, prompt, new, batch))
            progress(repeat * len(names) + place + 1, (repeats + 1) * len(names), name)
    found: dict[str, Speed] = {}
    for name, model in models.items():
        prefill, decode, latency = (min(column) for column in zip(*times[name], strict=True))
        count, size = _size(model)
        rates = (batch * prompt / prefill, batch * (new - 1) / decode, latency)
        found[name] = Speed(count, size, macs(model, prompt), *rates, peaks[name])
    return found


def macs(model: PreTrainedModel, prompt: int) -> int:
    """Multiply-adds of one row's prompt pass, the head at every position included, counted as they are dispatched."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        model(input_ids=_tokens(model, 1, prompt), use_cache=False)
    return counter.get_total_flops() // 2


def _round(model: PreTrainedModel, prompt: int, new: int, batch: int) -> tuple[float, float, float]:
    """Seconds of prefill, of decoding new - 1 tokens after the first, and to the first token of a single row."""
    ids = _tokens(model, batch, prompt)
    cache = DynamicCache()
    started = _now(model)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    prefilled = _now(model)
    for _ in range(new - 1):
        logits = model(input_ids=logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True).logits
    decoded = _now(model)
    if batch == 1:
        return prefilled - started, decoded - prefilled, prefilled - started
    model(input_ids=ids[:1], use_cache=True, logits_to_keep=1)
    return prefilled - started, decoded - prefilled, _now(model) - decoded


def _tokens(model: PreTrainedModel, batch: int, count: int) -> torch.Tensor:
    vocabulary = int(cast("Any", model.config).get_text_config().vocab_size)
    return torch.arange(batch * count, device=model.device).view(batch, count) * 7919 % vocabulary


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _size(model: PreTrainedModel) -> tuple[int, int]:
    parameters = list(model.parameters())  # tied ones once
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def _peak(model: PreTrainedModel, work: Callable[[], object]) -> int | None:
    gc.collect()
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        work()
        return _size(model)[1] + torch.cuda.max_memory_allocated(model.device) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the kernel's high-water mark of resident memory starts anew
        before = _status(status, "VmRSS")
    except (OSError, KeyError):
        work()
        return None
    work()
    return _size(model)[1] + _status(status, "VmHWM") - before


def _status(file: Path, name: str) -> int:
    lines = dict(line.split(":", 1) for line in file.read_text(encoding="utf-8").splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024

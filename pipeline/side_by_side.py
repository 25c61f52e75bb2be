"""Several models side by side, without a config: how fast they run, and what they write from the same prompts."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from evaluation import fluency, speed
from evaluation.generate import generate
from pipeline.console import Reporter
from pipeline.errors import ConfigError, SourceError
from pipeline.evaluation_commands import source_of
from pipeline.preflight import has_tokenizer
from pipeline.sources import Sources
from pipeline.stages import device as device_of
from pipeline.store import Store
from pruning import checkpoint


def run_speed(
    names: tuple[str, ...], store: Store, dtype: str, device: str, threads: int | None, reporter: Reporter, **sizes: int
) -> dict[str, Any]:
    """Every model's measures, interleaved; `sizes` are `speed.measure`'s prompt, new, batch and repeats."""
    if threads:
        torch.set_num_threads(threads)
    models = {name: _load(_folder(name, store, reporter), dtype, device) for name in names}
    with reporter.step("speed") as progress:
        found = speed.measure(models, progress=progress, **sizes)
    setting = {**sizes, "dtype": dtype, "device": device_of(device), "threads": torch.get_num_threads()}
    return {"settings": setting, "models": {name: measured.as_json() for name, measured in found.items()}}


def run_samples(
    names: tuple[str, ...],
    prompts: tuple[str, ...],
    new: int,
    store: Store,
    dtype: str,
    device: str,
    reporter: Reporter,
) -> dict[str, Any]:
    """Every model's texts after the same prompts, without sampling, and how much they repeat themselves.

    `truncated`: whether a prompt lost its beginning, as the model's window does not hold it.
    """
    asked = prompts or fluency.PROMPTS
    for prompt in asked:
        if any(0xD800 <= ord(letter) <= 0xDFFF for letter in prompt):  # how a byte that is no text comes in
            raise ConfigError(f"--prompt {prompt!r}: not UTF-8 text; encode it so")
    models: dict[str, Any] = {}
    for name in names:  # one at a time: nothing is timed
        folder = _folder(name, store, reporter)
        if not has_tokenizer(folder):
            raise SourceError(f"{name}: {folder} has no tokenizer; copy the files of its dense model's into it")
        model, tokenizer = _load(folder, dtype, device), checkpoint.load_tokenizer(folder)
        with reporter.step(f"texts of {name}") as progress:
            texts, cut = generate(model, tokenizer, asked, new, progress=progress)
        models[name] = {**fluency.measures(texts), "texts": texts, "truncated": cut}
    return {"prompts": list(asked), "new_tokens": new, "dtype": dtype, "models": models}


def speed_rows(found: dict[str, Any]) -> list[list[str]]:
    """A heading, then one row a measure; in brackets times the first model's."""
    models: dict[str, dict[str, Any]] = found["models"]
    measures = (
        ("parameters", "parameters", 1e6, "M"),
        ("weights", "bytes", 1e6, " MB"),
        ("multiply-adds of a prompt", "macs", 1e9, " G"),
        ("prefill tokens/s", "prefill_tokens_per_second", 1, ""),
        ("decode tokens/s", "decode_tokens_per_second", 1, ""),
        ("first token", "latency_seconds", 1e-3, " ms"),
        ("peak memory", "peak_bytes", 1e6, " MB"),
    )
    rows = [["", *models]]
    first = next(iter(models.values()))
    for label, key, unit, suffix in measures:
        cells = [
            "-"
            if m[key] is None
            else f"{m[key] / unit:.1f}{suffix}" + ("" if m is first else f" (×{m[key] / first[key]:.2f})")
            for m in models.values()
        ]
        rows.append([label, *cells])
    return rows


def sample_rows(found: dict[str, Any]) -> list[list[str]]:
    """A heading, then one row a measure of the texts."""
    models: dict[str, dict[str, Any]] = found["models"]
    rows = [["", *models]]
    for label, key in (
        ("repetition (4-grams)", "repetition"),
        ("distinct-1", "distinct_1"),
        ("distinct-2", "distinct_2"),
    ):
        rows.append([label, *(f"{m[key]:.3f}" for m in models.values())])
    rows.append(["words a text", *(f"{m['words']:.1f}" for m in models.values())])
    return rows


def _folder(name: str, store: Store, reporter: Reporter) -> Path:
    folder = Sources(store, {}, reporter.say).model_folder(source_of(name)[0])
    if not any(folder.glob("*.safetensors")):
        raise SourceError(f"{name}: {folder} has no .safetensors weights; regrow reads no others")
    return folder


def _load(folder: Path, dtype: str, device: str) -> PreTrainedModel:
    try:
        return checkpoint.load(folder, dtype=getattr(torch, dtype), device=device_of(device))
    except SafetensorError as error:
        raise SourceError(f"{folder}: its weights cannot be read ({error}); copy the model again") from error

"""The proof of an export: its own tool reloads it in a fresh process, and is compared with the model on real tokens.

The reference is the exported folder's source, loaded by regrow. For llama.cpp both compute in float32, so that what
differs is the file; log-probabilities are compared over the `TOP` most likely tokens of each position.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, StageError
from pipeline.export.model_folder import ModelFolder

TOKENS = 256  # of the passage, compared
TOP = 10
GENERATED = 8
SMALL = 50_000_000  # parameters
# What an exact form may differ by: llama.cpp keeps 16-bit factors of a product in 16 bits.
LEAST_AGREEMENT = 0.95
LEAST_AGREEMENT_QUANTIZED = 0.5  # below it the file is not this model, whatever the rounding
HERE = Path(__file__).parent


def passage() -> str:
    """The fixed text that is compared."""
    return (HERE / "passage.txt").read_text(encoding="utf-8")


def token_ids(model: ModelFolder, text: str | None = None, count: int | None = None) -> list[int]:
    """The first tokens of the passage (or `text`), as the folder's tokenizer has them, within the model's positions."""
    from pruning.checkpoint import load_tokenizer

    count = min(count or TOKENS, model.said["max_position_embeddings"] - GENERATED)
    try:
        tokenizer: Any = load_tokenizer(model.path)
    except (OSError, ValueError, AttributeError):
        generator = range(7, 7 + 31 * count, 31)  # a folder without a tokenizer is compared on plain numbers
        return [number % model.shape.vocabulary for number in generator]
    return tokenizer(text or passage())["input_ids"][:count]


def with_transformers(
    model: ModelFolder, folder: Path, remote: bool, exact: bool = True, adapter: Path | None = None,
    reference: Any = None, ids: list[int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Load `folder` in transformers, in a fresh process, and compare its logits with the model's.

    `reference`: another model to compare with; `exact`: whether weights are those of the model. Raises StageError where
    it does not load, or is not the same model.
    """
    import torch
    from safetensors import safe_open

    ids = ids or token_ids(model)
    reference = reference or _load(model.path)
    request = {"ids": ids, "remote": remote, "adapter": str(adapter) if adapter else None,
               "threads": _threads(model), "generate": GENERATED}  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        answer = Path(name) / "answer.safetensors"
        _run("fresh_transformers.py", folder, request, answer)
        with safe_open(answer, "pt") as tensors:
            theirs, generated, said = tensors.get_tensor("logits"), tensors.get_tensor("generated"), tensors.metadata()
    with torch.no_grad():
        prompt = torch.tensor([ids], device=reference.device)
        ours = reference(input_ids=prompt, use_cache=False).logits[0].float().cpu()
        length = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED}
        expected = reference.generate(input_ids=prompt[:, :8], **length, do_sample=False)[0].cpu()
    found = {
        **said,
        "parameters": int(said["parameters"]),
        "tokens": len(ids),
        "largest_logit_difference": float((ours - theirs).abs().max()),
        "argmax_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        "generated_equal": bool(torch.equal(expected, generated)),
    }
    return _accepted(found, exact, folder)


def with_llama_cpp(model: ModelFolder, file: Path, exact: bool, ids: list[int] | None = None) -> dict[str, Any]:
    """Load `file` in llama.cpp, in a fresh process, and compare its most likely tokens with the model's.

    Raises StageError where it does not load, tokenizes the passage otherwise, or is not the same model; ConfigError
    where llama.cpp is not installed.
    """
    import torch

    ids = ids or token_ids(model)
    request = {"text": passage(), "ids": ids, "top": TOP, "threads": _threads(model), "context": len(ids) + 8}
    with tempfile.TemporaryDirectory() as name:
        answer = Path(name) / "answer.json"
        _run("fresh_llama_cpp.py", file, request, answer)
        said = json.loads(answer.read_text(encoding="utf-8"))
    expected = token_ids(model, count=len(said["tokens"]) + 1)
    if said["tokens"][: len(expected)] != expected:
        first = next((n for n, pair in enumerate(zip(said["tokens"], expected, strict=False)) if len(set(pair)) > 1), 0)
        raise StageError(f"{file.name}: llama.cpp reads the passage as other tokens than transformers, from {first} on")
    with torch.no_grad():
        logits = _load(model.path, torch.float32)(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    ours = torch.log_softmax(logits.double(), dim=-1)
    largest = max(
        abs(log - float(ours[n, token])) for n, entries in enumerate(said["top"]) for token, log in entries[:TOP]
    )
    agree = [int(ours[n].argmax()) == entries[0][0] for n, entries in enumerate(said["top"])]
    found = {
        "tool": said["tool"],
        "tokens": len(ids),
        "largest_log_probability_difference": largest,
        "argmax_agreement": sum(agree) / len(agree),
        "tokenizer_equal": True,
    }
    return _accepted(found, exact, file)


def _threads(model: ModelFolder) -> int:
    """This process's, but one for a small model: threads that wait for each other cost it more than they give."""
    import torch

    return torch.get_num_threads() if model.shape.parameters() > SMALL else 1


def _load(folder: Path, dtype: Any = None) -> Any:
    from pruning import checkpoint

    return checkpoint.load(folder, dtype=dtype)


def _accepted(found: dict[str, Any], exact: bool, place: Path) -> dict[str, Any]:
    least = LEAST_AGREEMENT if exact else LEAST_AGREEMENT_QUANTIZED
    if found["argmax_agreement"] < least:
        raise StageError(
            f"{place.name}: {found['tool']} agrees on the most likely token at only {found['argmax_agreement']:.1%} of "
            f"{found['tokens']} positions ({found}); nothing was exported"
        )
    return found


def _run(script: str, target: Path, request: dict[str, Any], answer: Path) -> None:
    """Run a script of this folder, isolated from this process's packages and from the current folder."""
    asked = answer.with_name("request.json")
    asked.write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-I", str(HERE / script), str(target), str(asked), str(answer)]
    modules = {"HF_MODULES_CACHE": str(answer.with_name("modules")), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **modules}, check=False)
    if result.returncode or not answer.is_file():
        lines = result.stderr.strip().splitlines() or ["no message"]
        last = next((line for line in lines if "error loading model" in line), lines[-1])
        if "No module named" in last:
            raise ConfigError(f"{last}: the check of {target.name} needs it; pip install 'regrow[export]'")
        raise StageError(f"{target.name} does not load: {last}")

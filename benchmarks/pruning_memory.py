"""Peak memory of pruning a 1.1B Llama (TinyLlama's shape, random weights) in bfloat16, as a multiple of its weights.

    python benchmarks/pruning_memory.py [--work FOLDER] [--only taylor ...]

Every variant runs in a fresh process, which loads the saved model, prunes 20% of it and ends. Counted is the peak
resident memory (VmHWM) above what the process holds before the model is loaded, so that loading is part of it.
`ordinary` is LLM-Pruner's way: one backward pass with all gradients alive, then the same scores and the same cut.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, logging

from pruning import checkpoint, criteria
from pruning.architecture import Architecture
from pruning.memory import peak_bytes
from pruning.prune import prune
from pruning.structures import architecture, couple, named_weights
from pruning.surgery import cut

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 2048,
}  # fmt: skip
# method, its options, calibration samples and length
VARIANTS = {
    "ordinary": ("llm_pruner", {}, 10, 64),
    "taylor": ("llm_pruner", {}, 10, 64),
    "taylor hidden": ("llm_pruner", {"structures": ["hidden"], "round_to": 64}, 10, 64),
    "wanda": ("wanda", {}, 32, 128),
    "flap": ("flap", {"structures": ["ffn"]}, 32, 128),
    "wanda least_squares": ("wanda", {"compensation": "least_squares"}, 32, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where the model is kept (default: a temporary folder)")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.work)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        make(folder)
        print("| variant | weights | peak above start | of the weights | predicted | seconds |")
        print("|---|---:|---:|---:|---:|---:|")
        for variant in options.only:
            command = [sys.executable, __file__, "--variant", variant, "--work", str(folder)]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            ratio, predicted = found["peak"] / found["weights"], found["predicted"] / found["weights"]
            print(
                f"| {variant} | {found['weights'] / 1e9:.2f} GB | {found['peak'] / 1e9:.2f} GB | {ratio:.2f} "
                f"| {predicted:.2f} | {found['seconds']:.0f} |",
                flush=True,
            )


def make(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def measure(variant: str, folder: Path) -> dict[str, float]:
    import time

    logging.disable_progress_bar()
    method, options, samples, length = VARIANTS[variant]
    settings = criteria.load(method).Config(ratio=0.2, **options)
    ids = torch.randint(0, 32000, (samples, length), generator=torch.Generator().manual_seed(0))
    torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)  # the libraries' own buffers
    gc.collect()
    start, before = time.perf_counter(), resident("VmRSS")
    model = checkpoint.load(folder)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    shape = architecture(model)
    if variant == "ordinary":
        ordinary(model, ids)
    else:
        prune(model, ids, settings)
    predicted = peak_bytes(shape, 2, settings, (samples, length))
    seconds = time.perf_counter() - start
    return {"weights": weights, "peak": resident("VmHWM") - before, "predicted": predicted, "seconds": seconds}


def ordinary(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Every gradient alive, then scores, then the cut."""
    from pruning.allocation import allocate

    config = criteria.load("llm_pruner").Config(ratio=0.2)
    shape: Architecture = architecture(model)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    vectors = {}
    for name, weight in named_weights(model, hidden=False).items():
        salience = (weight.detach() * weight.grad).abs().float()
        vectors |= {f"{name}.rows": salience.sum(1), f"{name}.columns": salience.sum(0)}
    scores = couple(vectors, shape, config.structures)
    cut(model, allocate(shape, shape, scores, config, round(0.8 * shape.parameters())))


def resident(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) * 1024


if __name__ == "__main__":
    main()

"""Step time and peak memory of RandLoRA against PEFT's RandLoRA, PEFT's LoRA and full fine-tuning.

    python benchmarks/randlora_step.py [--shape smollm2|7b] [--dtypes ...] [--tokens ...] [--device cuda] [--no-memory]

One process, the same weights and batch for all: the decoder layers of a Llama of the given widths without its head,
rows of 512 tokens, all in one pass, all linear layers adapted, AdamW. A step is forward, backward, optimizer. Variants
take turns in every repeat; the fastest repeat counts, `spread` is how much slower the median was. LoRA's rank is the
one that comes nearest to RandLoRA's trainable parameters. Memory is the peak of a fresh process per variant (VmHWM; on
a GPU what torch allocates, in this process) above what it held when the model was loaded: adapters, gradients,
optimizer and activations of two steps.
"""

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import timing
import torch
from transformers import LlamaConfig, LlamaForCausalLM, logging

from recovery import adapters, inject
from recovery.base import Adapter

ROW = 512
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
}
LAYERS, RANKS = {"smollm2": 2, "7b": 1}, {"smollm2": 32, "7b": 32}
OURS, THEIRS, LORA, FULL = "ours: RandLoRA", "PEFT: RandLoRA", "PEFT: LoRA", "full fine-tuning"
VARIANTS = (OURS, THEIRS, LORA, FULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[1024, 4096, 8192])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine: with --threads 1")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(peak(options.peak, options.shape, options.dtypes[0], options.tokens[0])))
        return
    where = timing.place(options.device, options.threads)
    print(f"{options.shape}, {LAYERS[options.shape]} layers, {where}, torch {torch.__version__}\n")
    print("| dtype | tokens | variant | trained | fastest step, s | spread | ours is faster by | peak, MB |")
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for dtype in options.dtypes:
        for tokens in options.tokens:
            compare(options, dtype, tokens)


def compare(options: argparse.Namespace, dtype: str, tokens: int) -> None:
    """Print the rows of one dtype and number of tokens."""
    base = model_of(options.shape, dtype, options.device)
    made = {variant: build(variant, base, options.shape) for variant in options.variants}
    batch = batch_of(base, tokens)
    times: dict[str, list[float]] = {variant: [] for variant in made}
    clock = timing.clock(options.device, options.cpu_time)
    for repeat in range(options.repeats + 1):
        for variant, (step, _) in made.items():
            started = clock()
            step(*batch)
            if repeat:  # the first one warms up
                times[variant].append(clock() - started)
    trained = {variant: count for variant, (_, count) in made.items()}
    weights = sum(p.numel() * p.element_size() for p in base.model.layers.parameters())
    del made, base, batch, step
    for variant, seconds in times.items():
        fastest = min(seconds)
        spread = f"{100 * (statistics.median(seconds) / fastest - 1):.0f}%"
        ratio = f"{fastest / min(times[OURS]):.2f}x" if OURS in times else ""
        found = "" if options.no_memory else f"{measured(variant, options, dtype, tokens) / 1e6:.0f}"
        cells = (dtype, tokens, variant, f"{trained[variant]:,}", f"{fastest:.4g}", spread, ratio, found)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(f"| {dtype} | {tokens} | one copy of the weights | | | | | {weights / 1e6:.0f} |", flush=True)


def model_of(shape: str, dtype: str, device: str = "cpu") -> LlamaForCausalLM:
    """A few layers with random weights, without a vocabulary to speak of."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=LAYERS[shape], vocab_size=8, use_cache=False)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = LlamaForCausalLM(config).train().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


def batch_of(model: LlamaForCausalLM, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [rows, 512, hidden], and the gradient that arrives at the layers' end."""
    generator = torch.Generator().manual_seed(1)
    shape = (tokens // ROW, ROW, model.config.hidden_size)
    first, second = (torch.randn(shape, generator=generator).to(model.device, model.dtype) for _ in range(2))
    return first, second / first.numel()


def build(variant: str, base: LlamaForCausalLM, shape: str) -> tuple[Callable[..., None], int]:
    """A variant's step, and how many parameters it trains. The frozen weights are `base`'s own."""
    model: Any = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    rank = RANKS[shape]
    methods: dict[str, Any] = {}
    sharing: Any = Adapter  # whose `step` shares nothing
    if variant == OURS:
        inject.attach(model, adapters.load("randlora").Config(rank=rank), seed=0)
        methods = {name: layer.method for name, layer in inject.adapted(model).items()}
        sharing = adapters.load("randlora").Method
        parameters = list(inject.trainable(model).values())
    elif variant == FULL:
        for module in model.model.layers.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(parameter.data.clone()))
        parameters = list(model.model.layers.parameters())
    else:
        settings: Any = (
            peft.RandLoraConfig(r=rank, target_modules="all-linear", randlora_dropout=0.0)
            if variant == THEIRS
            else peft.LoraConfig(r=lora_rank(base, rank), target_modules="all-linear", lora_dropout=0.0)
        )
        model = peft.get_peft_model(model, settings).base_model.model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step(embeddings: torch.Tensor, gradient: torch.Tensor) -> None:
        with sharing.step(methods, embeddings.shape[0] * ROW, 1):  # as the trainer does for one pass
            model.model(inputs_embeds=embeddings).last_hidden_state.backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(parameter.numel() for parameter in parameters)


def lora_rank(base: LlamaForCausalLM, rank: int) -> int:
    """The rank at which LoRA trains as many parameters as RandLoRA, nearly."""
    sides = [sorted(linear.weight.shape) for linear in base.model.layers.modules() if hasattr(linear, "in_features")]
    trained = sum(-(-smaller // rank) * (rank + smaller) for smaller, _ in sides)
    return max(1, round(trained / sum(map(sum, sides))))


def measured(variant: str, options: argparse.Namespace, dtype: str, tokens: int) -> int:
    """Peak bytes of a variant in a fresh process; on a GPU, whose allocator counts, in this one."""
    if options.device == "cuda":
        return peak(variant, options.shape, dtype, tokens, "cuda")
    command = [sys.executable, __file__, "--peak", variant, "--shape", options.shape, "--dtypes", dtype]
    command += ["--tokens", str(tokens), "--threads", str(options.threads)]
    # Large blocks go back to the system at once, so that the peak is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def peak(variant: str, shape: str, dtype: str, tokens: int, device: str = "cpu") -> int:
    """Peak bytes of two steps above what the process held with the model loaded."""
    base = model_of(shape, dtype, device)
    batch = batch_of(base, tokens)
    gc.collect()  # what earlier variants left
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else status("VmRSS")
    step, _ = build(variant, base, shape)
    step(*batch)
    step(*batch)
    return (torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")) - before


def status(name: str) -> int:
    """Bytes that the system counts for this process under `name`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


if __name__ == "__main__":
    main()

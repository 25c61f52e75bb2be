"""A large model on one device: seconds and peak memory of pruning, and of training steps of several adapters.

    python benchmarks/large_model.py [--shape llama3-8b|llama-7b|small] [--steps 5] [--device cuda]

Random bfloat16 weights, random tokens: nothing of quality is seen. Pruned as `configs/llama3-8b-rora.yaml` says
(`llm_pruner`, 10 x 64 tokens, 20%, first 4 and last 2 layers protected); then steps of 2,048 tokens, all of them
learned, on the pruned model, each adapter on the projections that the config names. Peaks are what torch allocates on
a GPU, weights included (on a CPU nothing is counted: 0). PEFT's LoRA goes through transformers' own loss.
"""

import argparse
import copy
import gc
from collections.abc import Callable
from typing import Any

import peft
import timing
import torch
from transformers import LlamaConfig, LlamaForCausalLM, logging

from pruning import criteria
from pruning.memory import peak_bytes
from pruning.prune import prune
from pruning.structures import architecture
from recovery import adapters, inject
from recovery.data import Row
from recovery.loss import row_loss

SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "llama-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "small": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 1000,
    },
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
TOKENS, EXAMPLE = 2048, 128
# adapter, its options, tokens a row, gradient checkpointing
VARIANTS: dict[str, tuple[str, dict[str, Any], int, bool]] = {
    "RoRA 32, rows of 512": ("rora", {"rank": 32, "alpha": 32, "dropout": 0.05}, 512, False),
    "RoRA 32, one row": ("rora", {"rank": 32, "alpha": 32, "dropout": 0.05}, TOKENS, False),
    "RoRA 32, one row, gradient checkpointing": ("rora", {"rank": 32, "alpha": 32, "dropout": 0.05}, TOKENS, True),
    "RandLoRA 30, dropout 0.05, one row": ("randlora", {"rank": 30, "dropout": 0.05}, TOKENS, False),
    "RandLoRA 30, one row": ("randlora", {"rank": 30}, TOKENS, False),
    "PEFT: LoRA 32, one row": ("", {}, TOKENS, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--steps", type=int, default=5, help="timed, after one that warms up")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args()
    logging.disable_progress_bar()
    device = torch.device(options.device)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[options.shape], use_cache=False)).eval()
    torch.set_default_dtype(torch.float32)
    print(f"{options.shape}, torch {torch.__version__}, {timing.place(options.device, torch.get_num_threads())}\n")
    print("| | seconds | peak, GB | |\n|---|---:|---:|---|")
    print(f"| weights | | {_allocated(device) / 1e9:.1f} | {model.num_parameters() / 1e9:.2f}B parameters |")

    config = criteria.load("llm_pruner").Config(ratio=0.2, shape="free", protect={"first": 4, "last": 2})
    ids = torch.randint(0, model.config.vocab_size, (10, 64), generator=torch.Generator().manual_seed(0))
    predicted = peak_bytes(architecture(model), 2, config, (10, 64))
    seconds, peak, result = measured(device, lambda: prune(model, ids, config))
    said = f"`plan` predicts {predicted / 1e9:.1f} GB; {result.report['parameters_after'] / 1e9:.2f}B parameters left"
    print(f"| pruned | {seconds:.1f} | {peak / 1e9:.1f} | {said} |", flush=True)
    model = result.model.requires_grad_(False)
    del result
    for name, (method, settings, length, checkpointed) in VARIANTS.items():
        step, trained = build(model, method, settings, length, checkpointed)
        _, first, _ = measured(device, step)
        seconds, peak, _ = measured(device, lambda step=step: [step() for _ in range(options.steps)])
        speed = f"{TOKENS * options.steps / seconds:.0f} tokens/s; {trained / 1e6:.1f}M trained"
        print(
            f"| {name}: a step | {seconds / options.steps:.3f} | {max(first, peak) / 1e9:.1f} | {speed} |", flush=True
        )
        del step


def build(
    base: Any, method: str, options: dict[str, Any], length: int, checkpointed: bool
) -> tuple[Callable[[], None], int]:
    """A training step of one adapter on the frozen weights of `base`, and how many parameters it trains."""
    model = copy.deepcopy(base, {id(tensor): tensor for tensor in base.parameters()}).train()
    generator = torch.Generator().manual_seed(1)
    rows: list[Row] = []
    for _ in range(TOKENS // length):
        ids = torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist()
        rows.append(Row(ids=ids, labels=ids, positions=[place % EXAMPLE for place in range(length)]))
    methods: dict[str, Any] = {}
    if method:
        module = adapters.load(method)
        inject.attach(model, module.Config(**options, targets=TARGETS), seed=0)
        methods = {name: layer.method for name, layer in inject.adapted(model).items()}
        sharing: Any = module.Method
    else:
        settings: Any = peft.LoraConfig(r=32, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS)
        model, sharing = peft.get_peft_model(model, settings).train(), adapters.load("lora").Method
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        with sharing.step(methods, TOKENS, len(rows)):
            for row in rows:
                _loss(model, row, bool(method)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(parameter.numel() for parameter in parameters)


def _loss(model: Any, row: Row, ours: bool) -> torch.Tensor:
    if ours:
        return row_loss(model, row)[0] / TOKENS
    ids, positions = (torch.tensor([found], device=model.device) for found in (row.ids, row.positions))
    return model(input_ids=ids, labels=ids, position_ids=positions).loss


def measured(device: torch.device, work: Callable[[], Any]) -> tuple[float, int, Any]:
    """Seconds, peak bytes and what came of some work."""
    gc.collect()
    clock = timing.clock(device.type, cpu_time=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = clock()
    result = work()
    seconds = clock() - started
    return seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0, result


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


if __name__ == "__main__":
    main()

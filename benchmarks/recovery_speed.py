"""Useful training tokens per second: our trainer's loop against PEFT's LoRA under transformers' Trainer.

    python benchmarks/recovery_speed.py MODEL DATA [--dtypes bfloat16 float32] [--examples 160] [--device cuda]

MODEL is a folder; DATA one with SUITE/train.jsonl for the suites below, in lm-eval's schemas. Both sides train LoRA
(rank 8, all linear layers) on the answers of the same shuffled questions. PEFT's side is what one writes by hand:
batches of `--batch`, padded to their longest, loss -100 on prompts, AdamW. Ours are packed rows of `--row` tokens, one
a step. A token is useful when it is no padding. Sides take turns, each with a part of the data that both see; both
models live in this process. Counted is the time of training steps, first batch left out: no loading, no tokenizing.
"""

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import peft
import timing
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
)

from pipeline import rows
from pipeline.sections import DataConfig
from pipeline.sources import Sources
from pipeline.store import Store
from recovery import adapters, inject
from recovery.data import IGNORED, Tokens, batches, encode, pack
from recovery.loss import labelled, row_loss

SUITES = ("arc_easy", "arc_challenge", "openbookqa", "boolq")
LIMIT = 6000  # rows of a suite: BoolQ's passages are long and many
LONGEST, RANK = 512, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--examples", type=int, default=160, help="of one repeat, a multiple of --batch")
    parser.add_argument("--batch", type=int, default=8, help="examples of a step of PEFT's side")
    parser.add_argument("--row", type=int, default=LONGEST, help="tokens of a step of ours")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--adapter", default="lora", help="ours: lora, or another method with its default settings")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine: with --threads 1")
    options = parser.parse_args()
    if options.examples % options.batch or options.examples <= options.batch:
        parser.error("--examples: a multiple of --batch, and more: the first batch is not counted")
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    clock = timing.clock(options.device, options.cpu_time)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    parts = examples(options.data, tokenizer, options.repeats, options.examples)
    lengths = [len(tokens.ids) for part in parts for tokens in part]
    learned = sum(label != IGNORED for part in parts for tokens in part for label in tokens.labels)
    print(
        f"{len(lengths)} examples, mean length {statistics.mean(lengths):.1f}, {learned / sum(lengths):.1%} labelled,"
    )
    print(f"{timing.place(options.device, options.threads)}, torch {torch.__version__}, peft {peft.__version__}\n")
    print("| dtype | side | useful tokens/s, fastest | slowest | ours is faster by |")
    print("|---|---|---:|---:|---:|")
    for dtype in options.dtypes:
        sides = {"ours": Ours(options, dtype), "PEFT, Trainer": Theirs(options, dtype, tokenizer)}
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for part in parts:
            for name, side in sides.items():
                speeds[name].append(side.speed(part, clock))
        for name, found in speeds.items():
            ratio = f"{max(speeds['ours']) / max(found):.2f}x"
            print(f"| {dtype} | {name} | {max(found):.0f} | {min(found):.0f} | {ratio} |", flush=True)


def examples(folder: Path, tokenizer: Any, repeats: int, count: int) -> list[list[Tokens]]:
    """Encoded examples of all suites' train splits, shuffled, for every repeat."""
    with tempfile.TemporaryDirectory() as store:
        sources = Sources(Store(Path(store)), {})
        files = {suite: f"path:{folder / suite / 'train.jsonl'}" for suite in SUITES}
        wanted = [DataConfig(source=source, suite=suite, limit=LIMIT) for suite, source in files.items()]
        found = [example for part in wanted for example in rows.examples(sources, part, LONGEST)]
    chosen = random.Random(0).sample(found, repeats * count)
    parts = [chosen[n * count : (n + 1) * count] for n in range(repeats)]
    return [[t for e in part for t in encode(tokenizer, e, "response", LONGEST)] for part in parts]


class Ours:
    """The trainer's step (`recovery.train`) without its log and checkpoints."""

    def __init__(self, options: argparse.Namespace, dtype: str) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, dtype))
        self.model, self.row = model.to(options.device), options.row
        module = adapters.load(options.adapter)
        inject.attach(self.model, module.Config(**({"rank": RANK} if options.adapter == "lora" else {})), seed=0)
        self.method = module.Method
        self.layers = {name: layer.method for name, layer in inject.adapted(self.model).items()}
        self.parameters = list(inject.trainable(self.model).values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def speed(self, part: list[Tokens], clock: Any) -> float:
        """Useful tokens per second."""
        self.model.train()
        fed, started = 0, 0.0
        for number, batch in enumerate(batches(pack(part, self.row), 10**9, self.row, self.row)):
            if number == 1:
                fed, started = 0, clock()
            count, tokens = labelled(batch), sum(len(row.ids) for row in batch)
            with self.method.step(self.layers, tokens, len(batch)):
                for row in batch:
                    loss, _ = row_loss(self.model, row)
                    (loss / count).backward()
                    float(loss.detach())
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            fed += tokens
        if not started:
            raise SystemExit("--examples: too few, the first batch is not counted and there was no other")
        return fed / (clock() - started)


class Clock(TrainerCallback):
    """Notes when the steps of a Trainer end."""

    def __init__(self, clock: Any) -> None:
        self.clock, self.ends = clock, []

    def on_step_end(self, *given: Any, **named: Any) -> None:
        self.ends.append(self.clock())


class Theirs:
    """PEFT's LoRA under transformers' Trainer, padded batches in the data's order."""

    def __init__(self, options: argparse.Namespace, dtype: str, tokenizer: Any) -> None:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, dtype))
        settings: Any = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model, self.batch, self.cpu = peft.get_peft_model(model, settings), options.batch, options.device == "cpu"
        self.collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def speed(self, part: list[Tokens], clock: Any) -> float:
        """Useful tokens per second."""
        data: Any = [{"input_ids": t.ids, "labels": t.labels, "attention_mask": [1] * len(t.ids)} for t in part]
        noted = Clock(clock)
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                output_dir=folder, per_device_train_batch_size=self.batch, num_train_epochs=1, learning_rate=1e-4,
                optim="adamw_torch", report_to=[], save_strategy="no", logging_strategy="no", use_cpu=self.cpu,
                disable_tqdm=True, dataloader_drop_last=True, train_sampling_strategy="sequential",
            )  # fmt: skip
            trainer = Trainer(self.model, settings, data_collator=self.collator, train_dataset=data, callbacks=[noted])
            trainer.train()
        counted = part[self.batch : len(noted.ends) * self.batch]
        return sum(len(t.ids) for t in counted) / (noted.ends[-1] - noted.ends[0])


if __name__ == "__main__":
    main()

"""The shared-prefix scorer against lm-eval's HFLM at its best batch size: seconds a suite, and largest difference.

    python benchmarks/evaluation_speed.py --model FOLDER --data FOLDER [--config FILE] [--limit 100] [--batch 8 ...]

DATA holds SUITE/test.jsonl in lm-eval's schemas; a config brings the suites it names, from its own sources (cached in
`--store`). Both answer the same requests (built once, not timed) in one process,
the order changing with every repeat; the least time counts.
`--clock cpu` measures processor time, for a busy machine. HFLM runs every batch size, each suite's best is taken.
"""

import argparse
import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation import suites
from evaluation.harness import build_task
from evaluation.packing import pack
from evaluation.scorer import SharedPrefixLM
from pipeline import config_file, rows
from pipeline.sources import Sources
from pipeline.store import Store

os.environ["TQDM_DISABLE"] = "1"
EIGHT = ("boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")

Rows = list[dict[str, Any]]


def chosen(options: argparse.Namespace) -> dict[tuple[str, str], Rows]:
    """Rows by suite and where they are from."""
    found: dict[tuple[str, str], Rows] = {}
    if options.data:
        for suite in options.suite or EIGHT:
            lines = (options.data / suite / "test.jsonl").read_text(encoding="utf-8").splitlines()
            found[suite, "data"] = [json.loads(line) for line in lines[: options.limit]]
    if options.config:
        config = config_file.load(options.config)
        sources = Sources(Store(options.store), config.checksums, print)
        for scored in config.evaluation.suites:
            if local := scored.rows():
                found[scored.name, "config"] = rows.read_rows(sources, local)[: options.limit]
    return found


def requests_of(suite: str, items: Rows) -> list[Any]:
    task = build_task(suites.load(suite), items)
    task.build_all_requests()
    return task.instances


def timed(model: Any, requests: list[Any], clock: Callable[[], float]) -> tuple[float, list[float]]:
    started = clock()
    answers = model.loglikelihood(requests, disable_tqdm=True)
    return clock() - started, [value for value, _ in answers]


def arithmetic(lm: Any, requests: list[Any]) -> tuple[int, int]:
    """Weights times tokens that a suite costs at the least, ours and HFLM's: padding and attention left out.

    Both run distinct inputs once; HFLM's output head sees every token, ours the predicting ones.
    """
    pairs = [lm._encode_pair(*request.args) for request in requests]
    answers: dict[tuple[int, ...], int] = {}
    for context, continuation in pairs:
        ids = tuple((context + continuation)[:-1])
        answers[ids] = max(answers.get(ids, 0), len(continuation))
    inputs = list(answers)
    packed = pack(inputs, [len(ids) - answers[ids] for ids in inputs])
    tokens = sum(len(row.tokens) for row in packed) + sum(len(stem) for stem in {row.stem for row in packed})
    predicting = sum(
        len({node for at, path in zip(row.sequences, row.paths, strict=True) for node in path[-answers[inputs[at]] :]})
        for row in packed
    )
    layers = sum(weight.numel() for weight in lm.model.get_decoder().layers.parameters())
    head = lm.model.get_output_embeddings().weight.numel()
    return tokens * layers + predicting * head, sum(map(len, inputs)) * (layers + head)


def exact(lm: HFLM, request: Any) -> float:
    """A request's log-likelihood in float64, by itself."""
    context, continuation = lm._encode_pair(*request.args)
    with torch.inference_mode():
        ids = torch.tensor([context + continuation], device=lm.device)
        logits = copy.deepcopy(lm.model).double()(input_ids=ids).logits[0]
    predicting = logits[len(context) - 1 : -1].log_softmax(1)
    return float(predicting.gather(1, ids[0, len(context) :, None]).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--store", type=Path, default=Path("store"))
    parser.add_argument("--suite", action="append", choices=EIGHT)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--batch", type=int, action="append", help="batch sizes of HFLM (default 1, 4, 16)")
    parser.add_argument("--tokens", type=int, action="append", help="tokens a batch of ours (default: its own)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    if not (options.data or options.config):
        parser.error("--data or --config: one of them is needed")
    clock = timing.clock(options.device, options.clock == "cpu")
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    model = model.to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    own = {
        f"ours, {tokens} tokens" if tokens else "ours": SharedPrefixLM(model, tokens, tokenizer=tokenizer)
        for tokens in options.tokens or [None]
    }
    peers = {
        f"HFLM, batch {size}": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
        for size in options.batch or [1, 4, 16]
    }
    everyone: dict[str, Any] = own | peers
    totals = {"ours": 0.0, "HFLM": 0.0}
    costs = [0, 0]
    furthest: tuple[float, Any, float, float] = (-1.0, None, 0.0, 0.0)
    where = timing.place(options.device, options.threads)
    print(f"{options.limit} items a suite, {options.dtype}, {where}, {options.repeats} repeats\n")
    print("| suite | requests | " + " | ".join(everyone) + " | times faster | by arithmetic | largest difference |")
    print("|---|" + "---:|" * (len(everyone) + 4))
    for (suite, place), items in chosen(options).items():
        requests = requests_of(suite, items)
        seconds: dict[str, float] = {}
        answers: dict[str, list[float]] = {}
        for lm in everyone.values():
            lm.loglikelihood(requests[:4], disable_tqdm=True)
        for repeat in range(options.repeats):
            order = list(everyone) if repeat % 2 == 0 else list(everyone)[::-1]
            for name in order:
                taken, answers[name] = timed(everyone[name], requests, clock)
                seconds[name] = min(seconds.get(name, taken), taken)
        mine, best = min(own, key=lambda name: seconds[name]), min(peers, key=lambda name: seconds[name])
        totals["ours"] += seconds[mine]
        totals["HFLM"] += seconds[best]
        both = zip(requests, answers[mine], answers[best], strict=True)
        apart, *rest = max(((abs(a - b), request, a, b) for request, a, b in both), key=lambda found: found[0])
        furthest = max(furthest, (apart, *rest), key=lambda found: found[0])
        cells = [f"{seconds[name]:.2f}" for name in everyone]
        ratio = seconds[best] / seconds[mine]
        least = arithmetic(own[mine], requests)
        costs = [sum(pair) for pair in zip(costs, least, strict=True)]
        cells += [f"{ratio:.2f}", f"{least[1] / least[0]:.2f}", f"{apart:.2g}"]
        print(f"| {suite} ({place}) | {len(requests)} | {' | '.join(cells)} |", flush=True)
    print(
        f"\ntotal: {totals['ours']:.1f} s, HFLM at its best {totals['HFLM']:.1f} s: "
        f"{totals['HFLM'] / totals['ours']:.2f} times faster; {costs[1] / costs[0]:.2f} by arithmetic"
    )
    apart, request, a, b = furthest
    truth = exact(next(iter(peers.values())), request)
    print(f"furthest apart: ours {a:.5f}, HFLM {b:.5f}, in float64 {truth:.5f}")


if __name__ == "__main__":
    main()

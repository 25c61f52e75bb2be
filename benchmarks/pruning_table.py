"""Measure training-free pruning: every criterion, with and without compensation, at several ratios and seeds.

    python benchmarks/pruning_table.py configs/smollm2-135m-offline.yaml --data ../shared/data --out table.jsonl

The config names the model and the calibration text; `--data` holds `text/wikitext2-test-part1.txt` and
`commonsense/<suite>/test.jsonl`, which are scored and never calibrated with. One JSON line a cell goes to `--out`;
cells that are there are not measured again, so the script may be interrupted. `--table` prints what is there.
"""

import argparse
import copy
import itertools
import json
import statistics as numbers
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from evaluation import suites
from evaluation.examples import examples
from evaluation.perplexity import perplexity
from pipeline import calibration, config_file, rows
from pipeline.sources import Sources
from pipeline.store import Store
from pruning import checkpoint, criteria
from pruning.prune import prune
from pruning.statistics import measure

SUITES = ("boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
QUIET = {"progress": lambda done, total, note: None}


def main() -> None:
    options = _options()
    if options.table:
        print(table(_read(options.out)))
        return
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cells = yaml.safe_load(options.cells.read_text(encoding="utf-8"))
    config = config_file.load(options.config)
    sources = Sources(Store(options.store), config.checksums, print)
    folder = sources.model_folder(config.model.source)
    dense = checkpoint.load(folder, dtype=getattr(torch, config.model.dtype))
    tokenizer = checkpoint.load_tokenizer(folder)
    texts = rows.texts(sources, config.calibration)
    score = _Scorer(tokenizer, options.data, options.tokens, options.items)
    done = {_key(cell) for cell in _read(options.out)}
    measured: dict[Any, Any] = {}
    wanted = [{"label": "dense", "ratio": 0.0, "compensation": "none", "seed": 0}]
    for seed, ratio, label, compensation in itertools.product(
        options.seeds, options.ratios, cells["criteria"], options.compensations
    ):
        if ratio in cells["criteria"][label].get("ratios", options.ratios) and (
            not options.only or label in options.only
        ):
            wanted.append({"label": label, "ratio": ratio, "compensation": compensation, "seed": seed})
    for cell in wanted:
        if _key(cell) in done:
            continue
        start = time.perf_counter()
        model, extra = dense, {}
        if cell["ratio"]:
            said = {"compensation": cell["compensation"], **cells["criteria"][cell["label"]]}
            said.pop("ratios", None)
            if cell["compensation"] == "none" and said["method"] == "flap":
                said["compensation"] = "bias"  # FLAP without its bias is not FLAP
            settings = criteria.load(said["method"]).Config(ratio=cell["ratio"], seed=cell["seed"], **said)
            asked = criteria.statistics(settings)
            gradient = any(statistic.name != "activations" for statistic in asked)
            windows = {
                kind: torch.tensor(
                    calibration.windows(
                        tokenizer, texts, config.calibration.model_copy(update={**cells[kind], "seed": cell["seed"]})
                    )
                )
                for kind in ("calibration", "taylor")
            }
            ids = windows["taylor" if gradient else "calibration"]
            key = (cell["seed"], gradient, asked)
            if key not in measured:
                measured[key] = measure(dense, ids, asked, **QUIET)
            result = prune(copy.deepcopy(dense), ids, settings, measured[key], windows["calibration"])
            model, extra = result.model, {"ratio_reached": result.report["ratio_reached"]}
        pruned = time.perf_counter() - start
        cell |= {**extra, **score(model), "pruning_seconds": round(pruned, 1)}
        cell["seconds"] = round(time.perf_counter() - start, 1)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
        print(json.dumps(cell), flush=True)
    print(table(_read(options.out)))


class _Scorer:
    """WikiText-2 perplexity, and the mean log-probability per token of right answers, suite by suite."""

    def __init__(self, tokenizer: Any, data: Path, tokens: int, items: int):
        self.tokenizer, self.tokens = tokenizer, tokens
        self.text = (data / "text" / "wikitext2-test-part1.txt").read_text(encoding="utf-8")
        self.pairs: dict[str, list[tuple[list[int], int]]] = {}
        for name in SUITES:
            lines = (data / "commonsense" / name / "test.jsonl").read_text(encoding="utf-8").splitlines()[:items]
            found = examples(suites.load(name), [json.loads(line) for line in lines])
            encoded = [
                (tokenizer(context)["input_ids"], tokenizer(context + answer)["input_ids"]) for context, answer in found
            ]
            self.pairs[name] = [(whole, len(whole) - len(context)) for context, whole in encoded]

    @torch.inference_mode()
    def __call__(self, model: Any) -> dict[str, Any]:
        result = perplexity(model, self.tokenizer, [self.text], 512, self.tokens)
        gold = {name: self._gold(model, pairs) for name, pairs in self.pairs.items()}
        return {"perplexity": result["perplexity"], "gold": numbers.mean(gold.values()), "suites": gold}

    def _gold(self, model: Any, pairs: list[tuple[list[int], int]]) -> float:
        total = 0.0
        order = sorted(pairs, key=lambda pair: len(pair[0]))
        for start in range(0, len(order), 8):
            part = order[start : start + 8]
            width = max(len(ids) for ids, _ in part)
            padded = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part])  # causal: padding is not seen
            hidden = model.get_decoder()(input_ids=padded, use_cache=False).last_hidden_state
            for row, (ids, answer) in zip(hidden, part, strict=True):
                logits = model.get_output_embeddings()(row[len(ids) - answer - 1 : len(ids) - 1]).float()
                chosen = logits.log_softmax(-1).gather(1, torch.tensor(ids[-answer:])[:, None])
                total += float(chosen.mean())
        return total / len(pairs)


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: one line a criterion; perplexity and gold log-probability by ratio and compensation, mean ± spread."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["label"], cell["ratio"], cell["compensation"]), []).append(cell)
    columns = sorted({key[1:] for key in groups if key[1]}, key=lambda c: (c[0], c[1] != "none"))
    lines = [
        "| | " + " | ".join(f"{ratio:.0%} {name}" for ratio, name in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for label in dict.fromkeys(key[0] for key in groups):
        if label == "dense":
            (cell,) = groups["dense", 0.0, "none"]
            lines.append(f"| dense: {cell['perplexity']:.1f} / {cell['gold']:.2f}" + " | " * len(columns) + " |")
            continue
        lines.append(
            f"| {label} | " + " | ".join(_entry(groups.get((label, *column), [])) for column in columns) + " |"
        )
    return "\n".join(lines)


def _entry(cells: list[dict[str, Any]]) -> str:
    if not cells:
        return ""
    return " / ".join(
        f"{numbers.mean(values):.{digits}f}" + (f" ± {numbers.stdev(values):.{digits}f}" if len(values) > 1 else "")
        for name, digits in (("perplexity", 1), ("gold", 2))
        for values in [[cell[name] for cell in cells]]
    )


def _key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[name] for name in ("label", "ratio", "compensation", "seed"))


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--store", type=Path, default=Path("store"))
    parser.add_argument("--only", nargs="*", help="the criteria of these labels")
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.2, 0.35, 0.5])
    parser.add_argument("--compensations", nargs="*", default=["none", "least_squares"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--tokens", type=int, default=8_192, help="scored tokens of WikiText-2")
    parser.add_argument("--items", type=int, default=10, help="scored questions of each suite")
    parser.add_argument("--table", action="store_true", help="print the table of what --out holds")
    return parser.parse_args()


if __name__ == "__main__":
    main()

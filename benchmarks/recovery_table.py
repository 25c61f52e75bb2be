"""Measure recovery: one `regrow run` per cell and seed, and the table of what came back.

    python benchmarks/recovery_table.py --data ../shared/data --out recovery.jsonl [--only LABEL ...] [--seeds 0 1]

`recovery_table.yaml` holds the runs. `--data` has `text/` and `commonsense/SUITE/`. Seeds are recovery's: adapters,
held-out part and order; the pruned model is one. Cells that `--out` has are not run again, and what runs share (the
pruned model, the teacher's words, the dense model's scores) is cached. `--table` prints what is there.
"""

import argparse
import json
import statistics as numbers
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

# The suites on which the dense model stands clearly above chance, and lm-eval's usual metric of each.
METRIC = {"piqa": "acc", "arc_easy": "acc", "hellaswag": "acc_norm"}


def main() -> None:
    options = _options()
    if not options.table:
        said = options.cells.read_text(encoding="utf-8").replace("DATA", str(options.data.resolve()))
        cells = yaml.safe_load(said)
        for label in options.only or cells["cells"]:
            for seed in options.seeds:
                if any((cell["label"], cell["seed"]) == (label, seed) for cell in _read(options.out)):
                    continue
                cell = {"label": label, "seed": seed, **measured(laid_over(cells["base"], cells["cells"][label]), seed)}
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(cell) + "\n")
                print(_line(label, [cell]), flush=True)
    print(table(_read(options.out)))


def laid_over(base: Any, cell: Any) -> Any:
    """`cell`'s values over `base`'s, mapping by mapping."""
    if not (isinstance(base, dict) and isinstance(cell, dict)):
        return cell
    return {name: laid_over(base.get(name), cell[name]) if name in cell else base[name] for name in {**base, **cell}}


def measured(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Scores of the last model of the run, beside the dense model's, and what training said."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cell.yaml"
        path.write_text(yaml.safe_dump({"name": "recovery-table", **config}), encoding="utf-8")
        command = [sys.executable, "-m", "pipeline.cli", "run", str(path), "--json", "--set", f"recovery.seed={seed}"]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    trained = next(stage for stage in result["stages"] if stage["stage"] == "recover")
    report = json.loads((Path(trained["path"]) / "manifest.json").read_text(encoding="utf-8"))["report"]
    return {"models": result["models"], "seconds": trained["seconds"], "report": report}


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown, a line a label: mean over seeds ± standard deviation where there are several."""
    lines = [
        "| | seeds | trainable | tokens | validation loss | WikiText-2 perplexity | gold log-probability "
        "| " + ", ".join(METRIC) + " |",
        "|---|" + "---:|" * 7,
    ]
    if cells:
        fullest = max(cells, key=lambda cell: len(cell["models"]))  # a run without pruning has no pruned model
        for name in list(fullest["models"])[:-1]:
            lines.append(_line(name, [fullest], name))
    for label in dict.fromkeys(cell["label"] for cell in cells):
        lines.append(_line(label, [cell for cell in cells if cell["label"] == label]))
    return "\n".join(lines)


def _line(label: str, cells: list[dict[str, Any]], model: str | None = None) -> str:
    models = [cell["models"][model or list(cell["models"])[-1]] for cell in cells]
    reports = [cell["report"] for cell in cells]
    trained = ["", "", ""] if model else [
        f"{reports[0]['trainable_parameters'] / 1e6:.2f}M",
        f"{reports[0]['tokens']}",
        _spread([report["validation"][-1]["loss"] for report in reports], 3),
    ]  # fmt: skip
    accuracy = [numbers.mean(found["suites"][name][METRIC[name]] for name in METRIC) for found in models]
    parts = [
        label, str(len(cells)), *trained,
        _spread([found["perplexity"]["wikitext2"] for found in models], 1),
        _spread([found["gold_logprob"] for found in models], 2),
        _spread(accuracy, 3),
    ]  # fmt: skip
    return "| " + " | ".join(parts) + " |"


def _spread(values: list[float], digits: int) -> str:
    spread = f" ± {numbers.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{numbers.mean(values):.{digits}f}{spread}"


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="not needed for --table")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--only", nargs="*", help="cells of these labels")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--table", action="store_true", help="print the table of what --out holds")
    options = parser.parse_args()
    if not (options.table or options.data):
        parser.error("--data: missing; the folder with text/ and commonsense/")
    return options


if __name__ == "__main__":
    main()

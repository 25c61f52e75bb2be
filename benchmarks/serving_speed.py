"""Tokens per second of models in transformers and in llama.cpp, all in turn in one run: what pruning buys.

    python benchmarks/serving_speed.py DENSE PRUNED ... [--type q8_0] [--prompt 512] [--new 64] [--repeats 5]

Every argument is a model folder. transformers reads it in `--dtype`; llama.cpp a GGUF file of `--type` that is written
for the occasion. The order is reversed with every repeat; the fastest repeat counts. The first round warms up.
"""

import argparse
import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from evaluation import speed
from pipeline.export import gguf
from pipeline.export.config import GgufConfig
from pipeline.export.model_folder import ModelFolder
from pruning import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--type", default="q8_0", help="of the GGUF files")
    parser.add_argument("--dtype", default="float32", help="in transformers")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    folders = {f"{number}: {path}": path for number, path in enumerate(options.models, 1)}
    print(f"prompt {options.prompt}, {options.new} new tokens, one row, {options.threads} threads\n")
    print("| tool | model | prompt tokens/s | of the first | new tokens/s | of the first |")
    print("|---|---|---:|---:|---:|---:|")
    dtype = getattr(torch, options.dtype)
    loaded = {name: checkpoint.load(path, dtype=dtype) for name, path in folders.items()}
    measured = speed.measure(loaded, options.prompt, options.new, repeats=options.repeats)
    rows = {name: (one.prefill_tokens_per_second, one.decode_tokens_per_second) for name, one in measured.items()}
    show(f"transformers, {options.dtype}", rows)
    loaded.clear()
    show(f"llama.cpp, {options.type}", in_llama_cpp(folders, options))


def in_llama_cpp(folders: dict[str, Path], options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Tokens per second of prompt and of generation, by llama.cpp's own clock."""
    with tempfile.TemporaryDirectory() as scratch:
        servers: dict[str, Any] = {}
        for name, path in folders.items():
            out = Path(scratch) / str(len(servers))
            out.mkdir()
            config = GgufConfig(format="gguf", type=options.type)
            gguf.write(ModelFolder(path), out, config)
            servers[name] = serve(next(out.glob("*.gguf")), options)
        best = dict.fromkeys(folders, (0.0, 0.0))
        for repeat in range(options.repeats + 1):
            for name in list(servers) if repeat % 2 == 0 else list(servers)[::-1]:
                ids = [(37 * n + repeat) % 10_000 + 100 for n in range(options.prompt)]
                said = servers[name].handle_completions(
                    {"prompt": ids, "n_predict": options.new, "ignore_eos": True, "cache_prompt": False}
                )
                found = said["timings"]
                if repeat:
                    rates = (found["prompt_per_second"], found["predicted_per_second"])
                    best[name] = (max(best[name][0], rates[0]), max(best[name][1], rates[1]))
        return best


def serve(file: Path, options: argparse.Namespace) -> Any:
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = options.prompt + options.new + 8
    params.n_parallel = 1
    params.ui = False
    params.verbosity = 1  # errors
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    return xllamacpp.Server(params)


def show(tool: str, rows: dict[str, tuple[float, float]]) -> None:
    first = next(iter(rows.values()))
    for name, (prompt, new) in rows.items():
        print(f"| {tool} | {name} | {prompt:.0f} | {prompt / first[0]:.2f} | {new:.1f} | {new / first[1]:.2f} |")


if __name__ == "__main__":
    main()

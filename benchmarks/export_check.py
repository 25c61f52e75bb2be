"""Export a model in every form and let each form's own tool reload it: size, and what differs on real tokens.

    python benchmarks/export_check.py MODEL --text FILE [--format hf:pad --format gguf:q8_0 ...] [--tokens 2000]
    python benchmarks/export_check.py PRUNED --adapter ADAPTER --text FILE --format peft

MODEL is a folder, dense, pruned or merged; TEXT a plain text whose first tokens are compared. Tools run in a fresh
process in which regrow cannot be imported. A form that cannot hold the model is listed with the reason.
"""

import argparse
import tempfile
from pathlib import Path

import transformers

from pipeline.errors import ConfigError
from pipeline.export.check import token_ids
from pipeline.export.command import asked
from pipeline.export.lineage import of_folder
from pipeline.export.model_folder import ModelFolder
from pipeline.export.write import write

FORMS = (
    "hf", "hf:pad", "gguf:f32", "gguf:f16", "gguf:bf16", "gguf:q8_0", "gguf:q4_1", "vllm",
    "quantized:nf4", "quantized:int8", "quantized:torchao_int8",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--format", action="append", dest="formats", help=f"default: {', '.join(FORMS)}")
    parser.add_argument("--adapter", type=Path, help="the adapter's folder, for peft: MODEL is what it was trained on")
    parser.add_argument("--tokens", type=int, default=2000)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    model = ModelFolder(options.model, options.adapter)
    ids = token_ids(model, options.text.read_text(encoding="utf-8"), options.tokens)
    size = sum(file.stat().st_size for file in options.model.glob("*.safetensors"))
    print(f"{options.model.name}: {model.shape.parameters() / 1e6:.1f}M parameters, {size / 1e6:.0f} MB of weights; ")
    print(f"{len(ids)} tokens of {options.text.name}\n")
    print("| form | MB | read by | largest difference | most likely token agrees |\n|---|---:|---|---:|---:|")
    for config in asked(tuple(options.formats or FORMS)):
        with tempfile.TemporaryDirectory() as folder:
            try:
                report = write(model, Path(folder) / "export", config, of_folder(options.model), ids)
            except ConfigError as error:
                print(f"| {config.label} | | refused: {error} | | |", flush=True)
                continue
        found = report["check"]
        kind = next(key for key in found if key.startswith("largest"))
        what = kind.removeprefix("largest_").removesuffix("_difference").replace("_", " ")
        print(
            f"| {config.label} | {report['bytes'] / 1e6:.0f} | {found['tool']} | {what} {found[kind]:.2g} "
            f"| {found['argmax_agreement']:.2%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

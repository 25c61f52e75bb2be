"""The model card: what an exported model is made of, how it scores, and how each tool loads it."""

from typing import Any

from pipeline.export.config import ExportConfig, GgufConfig, PeftConfig, QuantizedConfig, VllmConfig
from pruning.config import SERVED

Lineage = dict[str, Any]


def text(config: ExportConfig, lineage: Lineage, report: dict[str, Any]) -> str:
    """The README.md of an exported folder."""
    licence = lineage.get("licence")
    head = ["---", *([f"license: {licence}"] if licence else []), "tags: [regrow, pruned]", "---", ""]
    parts = [
        "# Model card",
        "",
        f"Made with regrow: {_what(config, lineage)}.",
        "",
        "## Lineage",
        "",
        *_lineage(lineage),
        "",
        "## Results",
        "",
        *(_table(lineage["results"]) if lineage.get("results") else ["Not scored, or not known here."]),
        "",
        "## Loading",
        "",
        *_loading(config, report),
        "",
        "## Check",
        "",
        *_check(report),
        "",
        "## Licence",
        "",
        f"The source's: {licence}." if licence else "The source folder states none; the source's licence holds.",
    ]
    return "\n".join([*head, *parts]) + "\n"


def _what(config: ExportConfig, lineage: Lineage) -> str:
    alone = isinstance(config, PeftConfig)
    pruned = ", structurally pruned" if lineage.get("pruning") else ""
    merged = ", recovered with an adapter, merged" if lineage.get("recovery") and not alone else ""
    return f"{'an adapter for ' if alone else ''}a LLaMA-family model{pruned}{merged}"


def _lineage(lineage: Lineage) -> list[str]:
    if not lineage.get("source"):
        return ["Not known: the folder it was exported from does not say."]
    lines = [f"- source: {_named(lineage['source'].get('source'))}, dtype {lineage['source'].get('dtype')}"]
    if pruning := lineage.get("pruning"):
        said = pruning["config"]
        lines += [
            f"- pruning: criterion `{said['method']}`, ratio {said['ratio']} (reached {pruning['ratio_reached']:.4f}), "
            f"structures {', '.join(said['structures'])}, shape {said['shape']}, "
            f"compensation {said['compensation']['method']}, seed {said['seed']}",
            f"- calibration: {_named(pruning.get('calibration'))}",
        ]
    if lineage.get("parameters"):
        before, after = lineage["parameters"]
        lines.append(f"- parameters: {before:,} before, {after:,} after")
    recovery = lineage.get("recovery") or {}
    if read := recovery.get("read"):
        which = f"`{read['folder']}` ({read['format']} files, method {read['method']}, sha256 {read['sha256'][:16]})"
        lines.append(f"- adapter: read from a folder {which}; trained elsewhere")
    elif recovery:
        said = recovery["config"]
        adapter = ", ".join(f"{key} {value}" for key, value in said["adapter"].items() if value is not None)
        lines += [
            f"- adapter: {adapter}",
            f"- training: {said['tokens']:,} tokens, learning rate {said['learning_rate']}, seed {said['seed']}",
            *(f"- data: {_named(part)}" for part in recovery["data"]),
        ]
    lines += [f"- key of stage {stage}: `{key[:16]}`" for stage, key in lineage.get("keys", {}).items()]
    return lines


def _named(material: Any) -> str:
    """A source or rows, as its key material tells: kind, name, version, member; text, suite, half."""
    if not isinstance(material, dict):
        return "not recorded" if material is None else str(material)
    inner = material.get("source")
    flat = {**(inner if isinstance(inner, dict) else {}), **{k: v for k, v in material.items() if k != "source"}}
    words = [f"{key} {value}" for key, value in flat.items() if isinstance(value, str | int | float) and value != ""]
    return ", ".join(words) or "not recorded"


def _table(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]]


def _loading(config: ExportConfig, report: dict[str, Any]) -> list[str]:
    written = report["written"]
    if isinstance(config, GgufConfig):
        lines = ["```", f'llama-cli -m {written["file"]} -p "The river"', "```", ""]
        lines += [f"Architecture `{written['architecture']}` of llama.cpp; needs nothing else from this folder."]
        if written["fallback"]:
            lines += ["", f"Not stored as {config.type}:", *(f"- {line}" for line in written["fallback"])]
        return lines
    if isinstance(config, PeftConfig):
        load = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
                'base = AutoModelForCausalLM.from_pretrained("PRUNED_BASE")  # the pruned model it was trained on',
                'model = PeftModel.from_pretrained(base, "THIS_FOLDER")']  # fmt: skip
        warning = "It belongs to the pruned base above and to no other model, the dense one included."
        return ["```python", *load, "```", "", warning]
    remote = ", trust_remote_code=True" if written["trust_remote_code"] else ""
    lines = ["transformers:", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER"{remote})']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")', "```"]
    if remote:
        lines += [
            "Layers have widths of their own, which no stock class has: the modeling file lies beside the weights."
        ]
    if isinstance(config, QuantizedConfig):
        lines += [f"Needs the package that quantized it ({config.scheme}) installed."]
        lines += [f"- {line}" for line in written["fallback"]]
    if isinstance(config, VllmConfig):
        lines += ["", "vLLM:", "```", f"vllm serve THIS_FOLDER{' --trust-remote-code' if remote else ''}", "```"]
        lines += [f"({written['vllm']})"]
    elif not remote and not isinstance(config, QuantizedConfig):
        lines += ["", "vLLM serves this stock class too: `vllm serve THIS_FOLDER` (not run here)."]
    if padding := written.get("padding"):
        sizes = (
            f"{padding['parameters']:,} parameters to {padding['parameters_padded']:,} ({padding['larger_by']:+.1%})"
        )
        lines += ["", f"Padded with zeros from {sizes}: the same function, at the size and speed of the latter."]
    if written.get("class") in SERVED:
        lines += ["", "llama.cpp: export it with `regrow export --model THIS_FOLDER --format gguf`."]
    return lines


def _check(report: dict[str, Any]) -> list[str]:
    checked = report["check"]
    return [f"- {key.replace('_', ' ')}: {value}" for key, value in checked.items()]

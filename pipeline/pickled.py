"""LLM-Pruner's own checkpoints, whole pickled modules, to an ordinary model folder. Only with `--allow-pickle`.

A subprocess reads the file with an unpickler that makes nothing but tensors (`fresh_unpickle`). Widths come from the
shapes of the weights, layer by layer; the tokenizer is taken from a folder, if one is named.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, StageError

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM")
KEPT = ("vocab_size", "hidden_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_parameters",
        "rope_scaling", "sliding_window", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
        "hidden_act", "attention_bias", "mlp_bias")  # fmt: skip
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


def convert(file: Path, out: Path, tokenizer: Path | None, allowed: bool) -> dict[str, Any]:
    """Write the model pickled in `file` as a Hugging Face folder. Returns its class and parameters.

    Raises ConfigError without `allowed`, for a file that is not there, or an `out` that is.
    """
    if not allowed:
        raise ConfigError(f"{file}: a pickle can run any code when loaded; --allow-pickle reads its tensors alone")
    if not file.is_file():
        raise ConfigError(f"{file}: no such file")
    if out.exists():
        raise ConfigError(f"{out}: is there already; name another folder with -o")
    if tokenizer and not any(_tokenizer(tokenizer)):
        raise ConfigError(f"--tokenizer {tokenizer}: holds no tokenizer; name a folder with its files, or none")
    with tempfile.TemporaryDirectory() as name:
        script = Path(__file__).parent / "fresh_unpickle.py"
        command = [sys.executable, "-I", str(script), str(file.resolve()), name]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            reason = (result.stderr.strip() or "no message").splitlines()[-1]
            raise StageError(f"{file}: could not be read: {reason}")
        said = json.loads((Path(name) / "attributes.json").read_text(encoding="utf-8"))
        try:
            return _write(Path(name) / "tensors.safetensors", said, out, tokenizer)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error


def _write(weights: Path, said: dict[str, Any], out: Path, tokenizer: Path | None) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file, save_file

    from pruning.architecture import LayerShape
    from pruning.surgery import target

    if said["class"] not in FAMILY:
        raise ConfigError(f"it holds a {said['class']}; converted are {', '.join(FAMILY)}")
    tensors, old = load_file(weights), said["config"]
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}
    if absent := [name for name in ("hidden_size", "num_attention_heads") if not isinstance(old.get(name), int)]:
        raise ConfigError(f"its config has no {absent[0]}")
    count = len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
    size = old.get("head_dim") or old["hidden_size"] // old["num_attention_heads"]

    def rows(name: str) -> int:
        if f"{name}.weight" not in tensors:
            raise ConfigError(f"it has no {name}.weight")
        return tensors[f"{name}.weight"].shape[0]

    shapes: list[LayerShape] = []
    for index in range(count):
        place = f"model.layers.{index}"
        query, key, ffn = (rows(f"{place}.{part}") for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"))
        if query % key or key % size:
            raise ConfigError(f"{place}: {query} rows of q_proj and {key} of k_proj are not whole heads of {size}")
        shapes.append(LayerShape(ffn, key // size, query // key))
    config = {name: old[name] for name in KEPT if old.get(name) is not None}
    config |= {"sliding_window": None} if old.get("sliding_window", 0) is None else {}  # left out it would be Mistral's
    config |= {"head_dim": size, "num_attention_heads": old["num_attention_heads"]}
    try:
        made, made_class = target(said["class"], config, shapes, list(range(count)), old["hidden_size"], free=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in made_class(made).state_dict().items()}
    if config.get("tie_word_embeddings"):
        for held in (tensors, wanted):
            held.pop("lm_head.weight", None)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(wanted | found):
        if wanted.get(name) != found.get(name):
            shape, ours = (list(those[name]) if name in those else "none" for those in (found, wanted))
            raise ConfigError(f"{name}: its shape is {shape}, that of the model its config describes is {ours}")
    made.architectures, made.dtype = [made_class.__name__], next(iter(tensors.values())).dtype
    out.mkdir(parents=True)
    made.save_pretrained(out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for part in _tokenizer(tokenizer) if tokenizer else ():
        shutil.copyfile(part, out / part.name)
    return {"class": made_class.__name__, "parameters": sum(tensor.numel() for tensor in tensors.values())}


def _tokenizer(folder: Path) -> list[Path]:
    return [part for pattern in TOKENIZER for part in folder.glob(pattern) if part.is_file()]

"""GGUF to an ordinary Hugging Face folder: weights dequantized to float32, tokenizer, generation config."""

from pathlib import Path
from typing import Any

from pipeline.errors import SourceError


def dequantize(file: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into `folder`. Raises SourceError if transformers cannot read it, or
    would read another model.

    The weights keep their 4- or 8-bit rounding: what is written is a different model from the unquantized original.
    """
    if scaling := _scaling(file):
        raise SourceError(
            f"{file.name}: its rotary frequencies are scaled ({', '.join(scaling)}), which transformers does not read "
            "from GGUF: it would be another model; name the folder that the file was made from as the source"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, name = str(file.parent), file.name
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    except (ValueError, KeyError, OSError) as error:
        raise SourceError(f"{name}: transformers cannot read this GGUF file: {error}") from error
    # transformers still takes the model for a quantized one and would refuse to save it.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _scaling(file: Path) -> list[str]:
    """What in a GGUF file scales rotary frequencies: Llama 3.1's tensor, or llama.cpp's keys."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise SourceError(f"{file.name}: not a whole GGUF file: {error}") from error
    found = [tensor.name for tensor in reader.tensors if tensor.name.startswith(("rope_freqs.", "rope_factors_"))]
    for name, field in reader.fields.items():
        plain = {"type": ("none",), "factor": (0, 1), "scale_linear": (0, 1)}.get(name.rpartition(".")[2])
        if plain and ".rope." in name and (value := field.contents()) not in plain:
            found.append(f"{name}: {value}")
    return found

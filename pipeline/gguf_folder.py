"""GGUF to an ordinary Hugging Face folder: weights dequantized to float32, tokenizer, generation config."""

from pathlib import Path
from typing import Any

from pipeline.errors import SourceError


def dequantize(file: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into `folder`. Raises SourceError if transformers cannot read it.

    The weights keep their 4- or 8-bit rounding: what is written is a different model from the unquantized original.
    """
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

"""GGUF, for llama.cpp: one file with weights, tokenizer, chat template and rope settings.

Layers of one width are written as architecture `llama` (Qwen2 and Qwen3 under their own names), layers of different
widths as `deci`, whose head counts and FFN widths are arrays. llama.cpp rotates neighbouring pairs where transformers
rotates halves, so the rows of q and k are re-ordered inside every head (not for Qwen, which llama.cpp rotates by
halves). Matrices are quantized by the `gguf` package's own quantizers in blocks of 32 along the input width; where a
width is no multiple of that, the tensor stays float16, as llama.cpp's own quantizer has it. Norms and biases are
float32, embeddings and output head at least 8 bits. Tensors are written one at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.export import check as checks
from pipeline.export import gguf_tokenizer
from pipeline.export.config import GgufConfig
from pipeline.export.model_folder import ModelFolder

VERSION = 2
ROTATED_BY_HALVES = ("qwen2", "qwen3")
BLOCK = 32
FINEST_ENDS = "q8_0"  # embedding and head under a 4-bit type
ENDS = ("model.embed_tokens.weight", "lm_head.weight")
LAYER = {  # ours -> llama.cpp's
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: its name here and there, its shape [out, in], its type, its heads where rows of q or k
    are re-ordered."""

    ours: str
    theirs: str
    shape: tuple[int, ...]
    type: str
    heads: int | None = None


def architecture(model: ModelFolder) -> str:
    """What llama.cpp calls this model.

    Its qwen2 wants heads as wide as the hidden size and knows no scaled frequencies; with q, k and v biases its llama
    computes the same.
    """
    shape = model.shape
    if not model.uniform:
        return "deci"
    if model.name == "Qwen2ForCausalLM":
        square = shape.layers[0].groups * shape.layers[0].heads * shape.head_dim == shape.hidden
        return "qwen2" if square and frequency_factors(model) is None else "llama"
    if model.name == "Qwen3ForCausalLM":
        return "qwen3"
    return "llama"


def refusal(model: ModelFolder, config: GgufConfig) -> str | None:
    """Why llama.cpp cannot hold this model, or None."""
    return shape_refusal(model) or gguf_tokenizer.refusal(model)


def shape_refusal(model: ModelFolder) -> str | None:
    """The same from the config's entries alone, without the tokenizer."""
    if model.said.get("hidden_act", "silu") != "silu":
        return f"hidden_act is {model.said['hidden_act']}; llama.cpp computes silu here"
    if model.shape.head_norms and not model.uniform:
        return (
            "layers differ and q and k have norms, and of llama.cpp's architectures only deci lets layers differ, "
            "which reads no such norms; use hf:pad, and export that folder to gguf"
        )
    try:
        if frequency_factors(model) is not None and architecture(model) in ROTATED_BY_HALVES:
            return f"llama.cpp's {architecture(model)} reads no scaled rotary frequencies"
    except ValueError as error:
        return str(error)
    return None


def frequency_factors(model: ModelFolder) -> Any:
    """float32 [head_dim / 2]: what llama.cpp divides each rotary frequency by; None where nothing is scaled.

    Raises ValueError for a scaling that changes with the length, or scales attention besides.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from pruning.modeling_regrow import RegrowConfig

    names = ("rope_parameters", "rope_theta", "rope_scaling", "max_position_embeddings", "hidden_size")
    said = {name: model.said[name] for name in names if model.said.get(name) is not None}
    config: Any = RegrowConfig(**said, head_dim=model.shape.head_dim)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rope scaling {kind!r} cannot be written; default, linear and llama3 can")
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    size = model.shape.head_dim
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    return (plain / scaled).numpy()


def write(model: ModelFolder, out: Path, config: GgufConfig) -> dict[str, Any]:
    """Write `model-TYPE.gguf`. Returns its name, llama.cpp's name for the architecture, and which tensors could not
    be stored in the type asked for."""
    import numpy
    from gguf import GGMLQuantizationType, GGUFWriter, quant_shape_to_byte_shape, quantize

    file = out / f"model-{config.type}.gguf"
    writer = GGUFWriter(file, architecture(model))
    _describe(writer, model, config)
    gguf_tokenizer.describe(writer, model)
    factors = frequency_factors(model)
    tensors = list(_tensors(model, config))
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.type.upper()]
        if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            item = numpy.dtype(numpy.float32 if kind == GGMLQuantizationType.F32 else numpy.float16)
            size = int(numpy.prod(tensor.shape)) * item.itemsize
            writer.add_tensor_info(tensor.theirs, tensor.shape, item, size)
        else:
            shape = quant_shape_to_byte_shape(tensor.shape, kind)
            size = int(numpy.prod(shape))
            writer.add_tensor_info(tensor.theirs, shape, numpy.dtype(numpy.uint8), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for tensor in tensors:
        values = model.tensor(tensor.ours).float()
        if tensor.heads:
            values = interleaved(values, tensor.heads)
        writer.write_tensor_data(quantize(values.numpy(), GGMLQuantizationType[tensor.type.upper()]))
    writer.close()
    coarser = [t for t in tensors if len(t.shape) == 2 and t.type != _type(config, t.ours, BLOCK)]
    fallback = [f"{t.theirs}: {t.type} (width {t.shape[1]} is no multiple of {BLOCK})" for t in coarser]
    return {"file": file.name, "architecture": architecture(model), "fallback": fallback}


def check(model: ModelFolder, out: Path, config: GgufConfig, ids: list[int] | None = None) -> dict[str, Any]:
    """llama.cpp on the file against transformers on the folder, both computing in float32."""
    exact = config.type in ("f32", "f16", "bf16")
    return checks.with_llama_cpp(model, out / f"model-{config.type}.gguf", exact, ids)


def interleaved(values: Any, heads: int) -> Any:
    """Rows of q or k (entries of a bias): inside each head from halves (0.., h/2..) to pairs (0, h/2, 1, ..)."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape).contiguous()


def _describe(writer: Any, model: ModelFolder, config: GgufConfig) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_1": "MOSTLY_Q4_1"}
    said, shape = model.said, model.shape
    ffn, groups = [layer.ffn for layer in shape.layers], [layer.groups for layer in shape.layers]
    heads = [layer.groups * layer.heads for layer in shape.layers]
    scalars = model.uniform
    writer.add_file_type(LlamaFileType[types[config.type]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(len(shape.layers))
    writer.add_context_length(context_length(said))
    writer.add_embedding_length(shape.hidden)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_feed_forward_length(ffn[0] if scalars else ffn)
    writer.add_head_count(heads[0] if scalars else heads)
    writer.add_head_count_kv(groups[0] if scalars else groups)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(said["rms_norm_eps"])
    writer.add_rope_dimension_count(shape.head_dim)
    theta = (said.get("rope_parameters") or {}).get("rope_theta") or said.get("rope_theta") or 10000.0
    writer.add_rope_freq_base(theta)


def context_length(said: dict[str, Any]) -> int:
    """Positions; no more than a sliding window, within which full attention computes the same."""
    window = said.get("sliding_window") if said.get("use_sliding_window", True) else None
    return min(said["max_position_embeddings"], window or said["max_position_embeddings"])


def _tensors(model: ModelFolder, config: GgufConfig) -> Iterator[Tensor]:
    for name in ENDS[:1] if model.shape.tied else ENDS:
        yield Tensor(
            name, OUTER[name], (model.shape.vocabulary, model.shape.hidden), _type(config, name, model.shape.hidden)
        )
    yield Tensor("model.norm.weight", OUTER["model.norm.weight"], (model.shape.hidden,), "f32")
    for index, layer in enumerate(model.shape.layers):
        heads = {"self_attn.q_proj": layer.groups * layer.heads, "self_attn.k_proj": layer.groups}
        for part, theirs in LAYER.items():
            for kind in ("weight", "bias"):
                name = f"model.layers.{index}.{part}.{kind}"
                if name not in model.files:
                    continue
                values = model.tensor(name)
                if kind == "bias" and not values.any():
                    continue  # what FLAP leaves at zero need not be stored
                matrix = values.ndim == 2
                form = _type(config, name, values.shape[1]) if matrix else "f32"
                turned = None if architecture(model) in ROTATED_BY_HALVES else heads.get(part)
                yield Tensor(name, f"blk.{index}.{theirs}.{kind}", tuple(values.shape), form, turned)


def _type(config: GgufConfig, name: str, width: int) -> str:
    if config.type in ("q8_0", "q4_1"):
        if width % BLOCK:
            return "f16"
        return FINEST_ENDS if name in ENDS else config.type
    return config.type

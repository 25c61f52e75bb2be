"""A LLaMA-family model's shape, read from its config alone, and the parameters of any shape cut from it.

With d the hidden size, h the head dimension, K key-value groups of q query heads and an FFN of f channels, a layer has
2 d h K (q + 1) attention weights, 3 d f FFN weights and two norms of d, plus the biases and head norms that the
architecture brings (Qwen2: q, k and v biases; Qwen3: norms over the head dimension; Llama: on request).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class LayerShape:
    """FFN channels, key-value groups, and the query heads of each group."""

    ffn: int
    groups: int
    heads: int


NUMBERS = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
           "vocab_size")  # fmt: skip
NUMBERS_OR_NULL = ("head_dim", "num_key_value_heads")


@dataclass(frozen=True)
class Architecture:
    """What the parameter count hangs on. `layers` are the decoder layers' shapes, first to last."""

    hidden: int
    vocabulary: int
    head_dim: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool
    layers: tuple[LayerShape, ...]

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Architecture":
        """From the entries of a `config.json`, per-layer widths included.

        Raises ValueError for an entry that is missing or no number, and where query heads cannot be divided among a
        layer's key-value groups.
        """
        try:
            for entry in (config, *(config.get("per_layer_config") or {}).values()):
                _check(entry)
            return cls._of(config)
        except KeyError as error:
            raise ValueError(f"config.json has no {error.args[0]}, which its shape hangs on") from error

    @classmethod
    def _of(cls, config: Mapping[str, Any]) -> "Architecture":
        kind = config["model_type"].removeprefix("regrow_")
        heads = config["num_attention_heads"]
        own = {int(index): entry for index, entry in (config.get("per_layer_config") or {}).items()}
        layers: list[LayerShape] = []
        for index in range(config["num_hidden_layers"]):
            said = {**config, **own.get(index, {})}
            queries = said["num_attention_heads"]
            groups = said.get("num_key_value_heads") or queries
            if queries % groups:
                raise ValueError(
                    f"config.json: num_attention_heads: {queries} of layer {index} cannot be divided among "
                    f"num_key_value_heads: {groups}; every key-value head serves equally many, so one of them is wrong"
                )
            layers.append(LayerShape(said["intermediate_size"], groups, queries // groups))
        attention_bias = bool(config.get("attention_bias")) and kind != "mistral"
        return cls(
            hidden=config["hidden_size"],
            vocabulary=config["vocab_size"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            tied=bool(config.get("tie_word_embeddings")),
            qkv_bias=kind == "qwen2" or attention_bias,
            output_bias=kind != "qwen2" and attention_bias,
            mlp_bias=bool(config.get("mlp_bias")) and kind != "mistral",
            head_norms=kind == "qwen3",
            layers=tuple(layers),
        )

    def with_layers(self, layers: list[LayerShape], hidden: int | None = None) -> "Architecture":
        """The same architecture with other layers, and another hidden size if given."""
        return replace(self, layers=tuple(layers), hidden=self.hidden if hidden is None else hidden)

    def with_biases(self) -> "Architecture":
        """The same architecture with a bias on every projection."""
        return replace(self, qkv_bias=True, output_bias=True, mlp_bias=True)

    def layer_parameters(self, shape: LayerShape) -> int:
        """Parameters of one decoder layer."""
        d, size = self.hidden, self.head_dim
        query, key = shape.groups * shape.heads * size, shape.groups * size
        attention = 2 * d * (query + key) + self.qkv_bias * (query + 2 * key) + self.output_bias * d
        ffn = 3 * d * shape.ffn + self.mlp_bias * (2 * shape.ffn + d)
        return attention + ffn + 2 * d + self.head_norms * 2 * size

    def parameters(self) -> int:
        """Parameters of the model, tied embeddings once."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.hidden + sum(self.layer_parameters(shape) for shape in self.layers)


def _check(entries: Mapping[str, Any]) -> None:
    """Raise ValueError for an entry of a `config.json` that shapes or windows hang on and that is no whole number."""
    for name, value in entries.items():
        null = name in NUMBERS_OR_NULL and value is None
        if name in (*NUMBERS, *NUMBERS_OR_NULL) and not null and (type(value) is not int or value < 1):
            raise ValueError(f"config.json: {name}: {value!r} is no whole number above 0; correct it")

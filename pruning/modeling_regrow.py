"""Llama, Mistral, Qwen2 and Qwen3 whose layers have widths of their own. This file is copied next to the weights.

It imports nothing but torch, transformers and huggingface_hub, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where regrow is not installed.
Per-layer `num_attention_heads`, `num_key_value_heads` and `intermediate_size` stand in `per_layer_config` of the
config; everything else, forward passes and masks included, is the family's own. Written for and tested with
transformers 5.23 (needs 5.15 or newer).
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportMissingParameterType=false, reportPrivateUsage=false
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3


class _OwnConfigs:
    """Every layer has a config of its own, which transformers forgets when attention is chosen after loading."""

    def set_attn_implementation(self, *args, **kwargs):
        """Choose the attention of the model and of every layer; as in transformers."""
        super().set_attn_implementation(*args, **kwargs)
        for module in self.modules():
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                module.config._attn_implementation = self.config._attn_implementation


class _OwnWidths(_OwnConfigs):
    """The family's model, built layer by layer from `config.per_layer_config`.

    `parts`: the family's classes of a layer, a norm and the rotary embedding.
    """

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)  # not the family's, which would build uniform layers
        layer, norm, rotary = self.parts
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layers = [layer(config.per_layer_config[i], i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = rotary(config=config.per_layer_config[0])
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in (getattr(config, "layer_types", None) or ())  # Qwen asks
        self.post_init()


class _AroundIt(_OwnConfigs):
    """The family's language model around such a `model_class`."""

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


@strict
class RegrowConfig(LlamaConfig):
    """LlamaConfig with per-layer widths."""

    model_type = "regrow_llama"

    def validate_architecture(self):
        """Llama wants hidden_size divisible by the heads; with an explicit head_dim nothing needs that."""


class RegrowModel(_OwnWidths, LlamaModel):
    """LlamaModel with layers of different widths."""

    config_class = RegrowConfig
    parts = llama.LlamaDecoderLayer, llama.LlamaRMSNorm, llama.LlamaRotaryEmbedding


class RegrowForCausalLM(_AroundIt, LlamaForCausalLM):
    """LlamaForCausalLM around a RegrowModel."""

    config_class, model_class = RegrowConfig, RegrowModel


class RegrowMistralConfig(MistralConfig):
    """MistralConfig with per-layer widths."""

    model_type = "regrow_mistral"


class RegrowMistralModel(_OwnWidths, MistralModel):
    """MistralModel with layers of different widths."""

    config_class = RegrowMistralConfig
    parts = mistral.MistralDecoderLayer, mistral.MistralRMSNorm, mistral.MistralRotaryEmbedding


class RegrowMistralForCausalLM(_AroundIt, MistralForCausalLM):
    """MistralForCausalLM around a RegrowMistralModel."""

    config_class, model_class = RegrowMistralConfig, RegrowMistralModel


class RegrowQwen2Config(Qwen2Config):
    """Qwen2Config with per-layer widths."""

    model_type = "regrow_qwen2"


class RegrowQwen2Model(_OwnWidths, Qwen2Model):
    """Qwen2Model with layers of different widths."""

    config_class = RegrowQwen2Config
    parts = qwen2.Qwen2DecoderLayer, qwen2.Qwen2RMSNorm, qwen2.Qwen2RotaryEmbedding


class RegrowQwen2ForCausalLM(_AroundIt, Qwen2ForCausalLM):
    """Qwen2ForCausalLM around a RegrowQwen2Model."""

    config_class, model_class = RegrowQwen2Config, RegrowQwen2Model


class RegrowQwen3Config(Qwen3Config):
    """Qwen3Config with per-layer widths."""

    model_type = "regrow_qwen3"


class RegrowQwen3Model(_OwnWidths, Qwen3Model):
    """Qwen3Model with layers of different widths."""

    config_class = RegrowQwen3Config
    parts = qwen3.Qwen3DecoderLayer, qwen3.Qwen3RMSNorm, qwen3.Qwen3RotaryEmbedding


class RegrowQwen3ForCausalLM(_AroundIt, Qwen3ForCausalLM):
    """Qwen3ForCausalLM around a RegrowQwen3Model."""

    config_class, model_class = RegrowQwen3Config, RegrowQwen3Model

"""A Llama whose layers have widths of their own. This file is copied next to the weights it describes.

It imports nothing but torch, transformers and huggingface_hub, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where regrow is not installed.
Per-layer `num_attention_heads`, `num_key_value_heads` and `intermediate_size` stand in `per_layer_config` of the
config; everything else is Llama's. Written for and tested with transformers 5.23 (needs 5.15 or newer).
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportMissingParameterType=false, reportPrivateUsage=false
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


@strict
class RegrowConfig(LlamaConfig):
    """LlamaConfig with per-layer widths."""

    model_type = "regrow_llama"

    def validate_architecture(self):
        """Llama wants hidden_size divisible by the heads; with an explicit head_dim nothing needs that."""


class _OwnConfigs:
    """Every layer has a config of its own, which transformers forgets when attention is chosen after loading."""

    def set_attn_implementation(self, *args, **kwargs):
        """Choose the attention of the model and of every layer; as in transformers."""
        super().set_attn_implementation(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, LlamaAttention):
                module.config._attn_implementation = self.config._attn_implementation


class RegrowModel(_OwnConfigs, LlamaModel):
    """LlamaModel built layer by layer from `config.per_layer_config`."""

    config_class = RegrowConfig

    def __init__(self, config: RegrowConfig):
        LlamaPreTrainedModel.__init__(self, config)  # not LlamaModel's, which would build uniform layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layers = [LlamaDecoderLayer(config.per_layer_config[i], i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config.per_layer_config[0])
        self.gradient_checkpointing = False
        self.post_init()


class RegrowForCausalLM(_OwnConfigs, LlamaForCausalLM):
    """LlamaForCausalLM around a RegrowModel."""

    config_class = RegrowConfig

    def __init__(self, config: RegrowConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = RegrowModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

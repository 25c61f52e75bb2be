"""DeciLM as vLLM reads it (`block_configs`), for transformers. This file is copied next to the weights it describes.

Every layer is Llama's, with `block_configs[i].ffn.intermediate_size` channels and num_attention_heads /
`block_configs[i].attention.n_heads_in_group` key-value heads. Imports nothing but torch, transformers and
huggingface_hub. Written for and tested with transformers 5.23.
"""

# pyright: reportArgumentType=false, reportMissingParameterType=false, reportMissingTypeArgument=false, reportOptionalSubscript=false
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
from copy import copy

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


class Entries(dict):
    """A mapping whose entries are also attributes, as vLLM reads them, and that is still JSON."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


@strict
class DeciLMConfig(LlamaConfig):
    """LlamaConfig with block_configs."""

    model_type = "nemotron-nas"
    block_configs: list | None = None

    def __post_init__(self, **kwargs):
        blocks = self.block_configs or []
        self.block_configs = [Entries({name: Entries(part) for name, part in block.items()}) for block in blocks]
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """With an explicit head_dim the heads need not divide the hidden size."""

    def layer(self, index):
        """What layer `index` is built from."""
        block, own = self.block_configs[index], copy(self)
        own.num_key_value_heads = self.num_attention_heads // block.attention.n_heads_in_group
        own.intermediate_size = block.ffn.intermediate_size
        return own


class _OwnConfigs:
    """Every layer has a config of its own, which transformers forgets when attention is chosen after loading."""

    def set_attn_implementation(self, *args, **kwargs):
        """Choose the attention of the model and of every layer; as in transformers."""
        super().set_attn_implementation(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, LlamaAttention):
                module.config._attn_implementation = self.config._attn_implementation


class DeciLMModel(_OwnConfigs, LlamaModel):
    """LlamaModel built layer by layer."""

    config_class = DeciLMConfig

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)  # not LlamaModel's, which would build uniform layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layers = [LlamaDecoderLayer(config.layer(i), i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeciLMForCausalLM(_OwnConfigs, LlamaForCausalLM):
    """LlamaForCausalLM around a DeciLMModel."""

    config_class = DeciLMConfig

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = DeciLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

"""Random models of every served architecture, and tokens to run them on."""

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CLASSES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(4, 200, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def random_model():
    def make(kind: str = "llama", **options: Any) -> PreTrainedModel:
        shape = {
            "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 128,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, **options,
        }  # fmt: skip
        config, model = CLASSES[kind]
        torch.manual_seed(0)
        made = model(config(**shape)).eval()
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)  # zero biases would hide a wrong slice
            elif "norm" in name:
                torch.nn.init.uniform_(parameter, 0.8, 1.2)  # norms of one would hide a wrong order
        return made

    return make

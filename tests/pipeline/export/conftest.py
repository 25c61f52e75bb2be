"""Random models of every served architecture, pruned and saved, with a tokenizer that llama.cpp knows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.export import check
from pipeline.export.model_folder import ModelFolder
from pruning import checkpoint, criteria
from pruning.prune import prune

CLASSES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
Make = Callable[..., ModelFolder]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens, three of them special, with BOS."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special, alphabet = ["<unk>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([check.passage()], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 tokens tell a tiny model from another."""
    monkeypatch.setattr(check, "TOKENS", 48)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Make:
    """Make, prune and save a model: config options by name, pruning options as a mapping."""

    def make(kind: str = "llama", pruning: dict[str, Any] | None = None, **options: Any) -> ModelFolder:
        shape = {
            "vocab_size": len(tokenizer) + 5, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 256,
            "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, "pad_token_id": None, **options,
        }  # fmt: skip
        config, model = CLASSES[kind]
        torch.manual_seed(0)
        made = model(config(**shape)).eval()
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)  # zero biases would hide a missing one
            elif "norm" in name:
                torch.nn.init.uniform_(parameter, 0.8, 1.2)
        if pruning:
            settings = criteria.load(pruning.get("method", "magnitude")).Config(**{"method": "magnitude", **pruning})
            ids = torch.randint(4, 400, (2, 16), generator=torch.Generator().manual_seed(1))
            made = prune(made, ids, settings).model
        checkpoint.save(made, tokenizer, tmp_path / "model")
        return ModelFolder(tmp_path / "model")

    return make

"""One training step against plain autograd and torch's AdamW."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from recovery import inject
from recovery.config import RecoveryConfig
from recovery.data import Example
from recovery.train import train


def test_one_step_is_plain_autograd_and_adamw(tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, tmp_path: Path):
    text = "the cat sees"
    settings: dict[str, Any] = {"tokens": 13, "batch_tokens": 13, "max_length": 13, "learning_rate": 1e-2}
    settings |= {"warmup": 0.0, "final_rate": 1.0, "validation": {"fraction": 0.0}}
    config = RecoveryConfig.model_validate({"adapter": {"method": "lora", "rank": 4}, **settings})
    start = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    other = LlamaForCausalLM(tiny_model.config).eval()
    other.load_state_dict(start)
    inject.attach(other, config.adapter, config.seed)
    parameters = inject.trainable(other)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    ids = tiny_tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids.shape[1] == 13
    other(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimizer.step()

    train(tiny_model, tiny_tokenizer, [(1.0, [Example("", text)])], config, tmp_path)
    for name, parameter in inject.trainable(tiny_model).items():
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-4, atol=1e-6)

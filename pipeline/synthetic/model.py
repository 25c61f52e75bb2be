"""The small world's model: a Llama of about a million parameters and a word tokenizer, trained from nothing."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.synthetic.world import World

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


@dataclass(frozen=True)
class Schedule:
    """How long the model is trained: steps of `batch` lines, AdamW, a linear rise and fall of the rate.

    A step's lines are fed in `parts` of like length, so that little is padding.
    """

    steps: int = 300
    batch: int = 64
    parts: int = 3
    rate: float = 8e-3


def train(
    world: World, folder: Path, seed: int, progress: Callable[[int, int, str], None], schedule: Schedule | None = None
) -> None:
    """Train on the world's sentences and questions, and save model and tokenizer into `folder` (float32)."""
    plan = schedule or Schedule()
    questions = [prompt + response + " ." for prompt, response in world.examples]
    tokenizer = _tokenizer([*world.text, *questions])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, weight_decay=0.1, betas=(0.9, 0.98))
    chance = random.Random(seed)
    for step in range(plan.steps):
        share = min((step + 1) / (0.1 * plan.steps), (plan.steps - step) / (0.9 * plan.steps))
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * share
        lines = _documents(world.text, chance) + questions
        chosen: Any = tokenizer(chance.sample(lines, min(plan.batch, len(lines))))["input_ids"]
        chosen.sort(key=len)
        labelled = sum(len(line) - 1 for line in chosen)  # nothing foretells a line's first token
        mean = 0.0
        for part in range(plan.parts):
            ids, labels = _batch(chosen[part * len(chosen) // plan.parts : (part + 1) * len(chosen) // plan.parts])
            loss: Any = model(input_ids=ids, labels=labels, num_items_in_batch=labelled).loss
            loss.backward()
            mean += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1, plan.steps, f"loss {mean:.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _documents(sentences: list[str], chance: random.Random) -> list[str]:
    """The sentences in a new order, one to three a line, so that text of any length is familiar."""
    shuffled = chance.sample(sentences, len(sentences))
    lines: list[str] = []
    while shuffled:
        count = chance.randint(1, 3)
        lines.append(" ".join(shuffled[:count]))
        shuffled = shuffled[count:]
    return lines


def _config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=400,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )


def _tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """One token a word, the blank before it included, as LLaMA's tokenizers have it; begins with <s>."""
    words = sorted({word for line in lines for word in line.split()})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *(f"▁{word}" for word in words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _batch(lines: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels [lines, longest], padded on the right; padding is not learned."""
    longest = max(map(len, lines))
    ids = torch.tensor([line + [3] * (longest - len(line)) for line in lines])
    labels = torch.tensor([line + [-100] * (longest - len(line)) for line in lines])
    return ids, labels

"""Tokens, labels, the mix and the packing."""

from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from recovery.data import IGNORED, Example, Row, Tokens, batches, encode, hold_out, mix, pack
from recovery.loss import labelled, mean_loss, row_loss


def letters(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of single letters; a blank is Ġ in this vocabulary."""
    return [tokenizer.convert_tokens_to_ids("Ġ" if letter == " " else letter) for letter in text]  # type: ignore


def test_response_only_labels(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """By hand: BOS a b, then blank c d; the prompt's blank belongs to the response."""
    blank, c, d = letters(tiny_tokenizer, " cd")
    for example in (Example("ab ", "cd"), Example("ab", " cd")):
        (tokens,) = encode(tiny_tokenizer, example, "response", 100)
        assert tokens.ids == [1, *letters(tiny_tokenizer, "ab cd")]
        assert tokens.labels == [IGNORED, IGNORED, IGNORED, blank, c, d]
    (ended,) = encode(tiny_tokenizer, Example("ab", " cd", end=True), "response", 100)
    assert (ended.ids[-1], ended.labels[-1]) == (2, 2)
    (full,) = encode(tiny_tokenizer, Example("ab", " cd"), "full", 100)
    assert full.labels == full.ids


def test_long_examples(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (pair,) = encode(tiny_tokenizer, Example("abcdefgh", "xyz"), "response", 6)
    assert pair.ids == letters(tiny_tokenizer, "fghxyz")  # the prompt's beginning goes
    assert pair.labels == [IGNORED] * 3 + letters(tiny_tokenizer, "xyz")
    windows = encode(tiny_tokenizer, Example("", "abcdefghijk"), "response", 6)
    assert [window.ids for window in windows] == [
        [1, *letters(tiny_tokenizer, "abcde")],
        letters(tiny_tokenizer, "fghijk"),
    ]
    assert windows[1].labels == windows[1].ids
    assert encode(tiny_tokenizer, Example("ab", ""), "response", 6) == []
    assert encode(tiny_tokenizer, Example("", ""), "full", 6) == []  # BOS alone


def merging_tokenizer(add_bos: bool) -> PreTrainedTokenizerFast:
    """A BPE with merges, so that where prompt and response meet matters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore
    text = ["Question: what is red?\nAnswer: the red rose", "Answer: roses are red", "a redwood, the reddest"] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    if add_bos:
        from tokenizers import processors

        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # type: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.mark.parametrize("add_bos", [False, True])
def test_split_agrees_with_lm_eval(add_bos: bool, tiny_model: LlamaForCausalLM) -> None:
    from lm_eval.models.huggingface import HFLM

    tokenizer = merging_tokenizer(add_bos)
    reference = HFLM(pretrained=tiny_model, tokenizer=tokenizer, add_bos_token=add_bos, batch_size=1)
    pairs = [
        ("Question: what is red?\nAnswer:", " the red rose"),
        ("Question: what is red?\nAnswer: ", "the red rose"),
        ("Answer: roses are\n \n", "red"),
        ("a red", "wood, the reddest"),  # merges across the boundary
    ]
    for prompt, response in pairs:
        context, continuation = reference._encode_pair(prompt, response)
        (tokens,) = encode(tokenizer, Example(prompt, response), "response", 1000)
        assert tokens.labels[-len(continuation) :] == continuation
        assert tokens.labels[: -len(continuation)] == [IGNORED] * (len(tokens.ids) - len(continuation))
        assert tokens.ids == tokenizer(prompt + response)["input_ids"]
        assert len(context) + len(continuation) == len(tokens.ids)
        assert (tokens.ids[0] == 1) == add_bos


def test_hold_out_is_seeded_and_kept_out() -> None:
    sources = [(1.0, [Example("", f"text {n}") for n in range(100)]), (1.0, [Example("q", str(n)) for n in range(10)])]
    sources[0][1].append(Example("", "text 7"))  # a second time
    training, held = hold_out(sources, 0.05, seed=3)
    assert [len(part) for part in held] == [5, 1]
    assert not {e for _, part in training for e in part} & {e for part in held for e in part}
    assert sum(len(part) for _, part in training) + sum(map(len, held)) in (111, 110)
    assert hold_out(sources, 0.05, seed=3) == (training, held)
    assert hold_out(sources, 0.05, seed=4)[1] != held
    assert hold_out(sources, 0.0, seed=3) == (sources, [[], []])
    assert hold_out([(1.0, sources[1][1][:9])], 0.05, 0)[1] == [[]]


def test_what_shares_a_passage_is_held_out_with_it() -> None:
    texts = [Example("", f"passage {n}", group=str(n)) for n in range(20)]
    questions = [Example(f"passage {n}, question {m}?", " yes", group=str(n)) for n in range(20) for m in range(3)]
    training, held = hold_out([(1.0, texts), (1.0, questions)], 0.1, seed=0)
    assert [len(part) for part in held] == [2, 6]
    aside = {example.group for part in held for example in part}
    for (_, kept), before in zip(training, (texts, questions), strict=True):
        assert kept == [example for example in before if example.group not in aside]


def test_a_source_of_which_all_is_held_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recovery\.data\.1: all of its 12 examples are held out"):
        hold_out([(1.0, [Example("", "other")]), (1.0, [Example("", "same")] * 12)], 0.1, seed=0)


def test_mix_keeps_the_weights_in_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sources = [(3.0, [Example("", "a" * n) for n in (5, 17, 40)]), (1.0, [Example("", "b" * n) for n in (3, 9)])]
    fed: Counter[int] = Counter()
    for tokens in islice(mix(sources, tiny_tokenizer, "full", 64, seed=0), 400):
        fed[tokens.ids[-1]] += len(tokens.ids)
    a, b = letters(tiny_tokenizer, "ab")
    assert fed[a] + fed[b] > 3000
    assert abs(fed[a] - 3 * fed[b]) <= 41 + 3 * 10  # never further apart than one example


def test_mix_reshuffles_every_epoch_by_the_seed(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sources = [(1.0, [Example("", "a" * n) for n in range(1, 21)])]

    def epochs(seed: int) -> list[list[int]]:
        lengths = [len(tokens.ids) for tokens in islice(mix(sources, tiny_tokenizer, "full", 64, seed), 60)]
        return [lengths[start : start + 20] for start in (0, 20, 40)]

    first, second, third = epochs(0)
    assert sorted(first) == sorted(second) == sorted(third) == list(range(2, 22))
    assert first != second != third
    assert epochs(0) == [first, second, third]
    assert epochs(1)[0] != first


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([(1.0, [])], "recovery.data.0: none of 0 examples"),
        ([(1.0, [Example("", "a")]), (1.0, [Example("only a prompt", "")])], "recovery.data.1: none of 1 examples"),
        ([(0.0, [Example("", "a")])], "weight 0.0 is not positive"),
    ],
)
def test_useless_sources_are_refused(sources: Any, message: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=message):
        list(islice(mix(sources, tiny_tokenizer, "response", 64, 0), 10))


def test_pack_by_hand() -> None:
    examples = [Tokens([n] * size, [n] * size) for n, size in ((5, 3), (6, 2), (7, 4))]
    rows = list(pack(iter(examples), 6))
    assert rows[0] == Row([5, 5, 5, 6, 6], [IGNORED, 5, 5, IGNORED, 6], [0, 1, 2, 0, 1])
    assert rows[1] == Row([7] * 4, [IGNORED, 7, 7, 7], [0, 1, 2, 3])
    assert labelled(rows) == 6


def test_batches_respect_step_and_budget() -> None:
    rows = [Row([1] * size, [1] * size, list(range(size))) for size in (6, 8, 5, 8, 8, 8)]
    made = [[len(row.ids) for row in batch] for batch in batches(iter(rows), budget=38, batch_tokens=16, max_length=8)]
    assert made == [[6, 8], [5, 8], [8]]  # 35 fed; another 8 would be 43
    assert list(batches(iter(rows), budget=5, batch_tokens=16, max_length=8)) == []


@pytest.fixture
def row(tiny_tokenizer: PreTrainedTokenizerFast) -> tuple[Row, list[Tokens]]:
    examples = [Example("What is it?", " a rose"), Example("", "plain text"), Example("Who?", " nobody at all")]
    parts = [tokens for example in examples for tokens in encode(tiny_tokenizer, example, "response", 64)]
    (made,) = pack(iter(parts), 64)
    return made, parts


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_do_not_see_each_other(
    row: tuple[Row, list[Tokens]], attention: str, tiny_model: LlamaForCausalLM
) -> None:
    made, parts = row
    tiny_model.set_attn_implementation(attention)
    ids, positions = torch.tensor([made.ids]), torch.tensor([made.positions])
    packed = tiny_model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    separate = torch.cat([tiny_model(input_ids=torch.tensor([part.ids])).logits[0] for part in parts])
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5)
    joined = tiny_model(input_ids=ids, use_cache=False).logits[0]
    assert (joined - separate).abs().max() > 1e-2  # without restarts they do


def test_row_loss_is_the_sum_over_labels(
    row: tuple[Row, list[Tokens]], tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, parts = row
    expected, count = 0.0, 0
    for part in parts:
        labels = torch.tensor([part.labels])
        number = int((labels[:, 1:] != IGNORED).sum())
        expected += float(tiny_model(input_ids=torch.tensor([part.ids]), labels=labels).loss.detach()) * number
        count += number
    assert labelled([made]) == count
    headed: list[int] = []
    tiny_model.lm_head.register_forward_hook(lambda head, given, logits: headed.append(len(logits)))
    loss, number = row_loss(tiny_model, made)
    assert headed == [count] != [len(made.ids) - 1]  # logits nowhere else
    assert number == count
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-4)
    assert mean_loss(tiny_model, [made, made]) == pytest.approx(expected / count, abs=1e-5)
    (gradient,) = torch.autograd.grad(loss, [tiny_model.model.layers[0].mlp.up_proj.weight])
    monkeypatch.setattr("recovery.loss.CHUNK", 7)
    headed.clear()
    chunked, _ = row_loss(tiny_model, made)
    assert (sum(headed), max(headed)) == (count, 7)
    assert float(chunked.detach()) == pytest.approx(expected, abs=1e-4)
    (again,) = torch.autograd.grad(chunked, [tiny_model.model.layers[0].mlp.up_proj.weight])
    torch.testing.assert_close(again, gradient, rtol=1e-4, atol=1e-6)


def test_bfloat16_logits_of_a_slow_processor_are_as_good(
    row: tuple[Row, list[Tokens]], tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 where bfloat16 is slow; the same loss and gradient within bfloat16's eight bits, and the native head
    is not run."""
    weight = tiny_model.model.layers[0].mlp.up_proj.weight
    expected, _ = row_loss(tiny_model, row[0])
    (wanted,) = torch.autograd.grad(expected, [weight])
    tiny_model.bfloat16().requires_grad_(False)
    weight = tiny_model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    headed: list[int] = []
    tiny_model.lm_head.register_forward_hook(lambda head, given, logits: headed.append(len(logits)))
    for slow in (False, True):
        monkeypatch.setattr("recovery.products.slow_bfloat16", lambda slow=slow: slow)
        headed.clear()
        loss, _ = row_loss(tiny_model, row[0])
        assert bool(headed) != slow
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=0.01)
        (gradient,) = torch.autograd.grad(loss, [weight])
        assert (gradient.float() - wanted).abs().max() < 0.05 * wanted.abs().max()

import itertools
from typing import Any

import torch
from transformers import LlamaForCausalLM

from recovery.data import IGNORED, Example, Tokens, encode, hold_out, mix, pack
from recovery.train import row_loss


def test_labels_stand_on_the_response_alone(tiny_tokenizer: Any):
    (tokens,) = encode(tiny_tokenizer, Example("Q a", " b"), "response", 100)
    # One token a byte after <s>; the prompt is <s> and three bytes.
    assert len(tokens.ids) == 6
    assert tokens.labels == [IGNORED] * 4 + tokens.ids[4:]
    (full,) = encode(tiny_tokenizer, Example("Q a", " b"), "full", 100)
    assert full.labels == full.ids == tokens.ids


def test_trailing_blanks_of_the_prompt_belong_to_the_response(tiny_tokenizer: Any):
    (tokens,) = encode(tiny_tokenizer, Example("Q ", "b"), "response", 100)
    assert tokens.labels == [IGNORED, IGNORED, *tokens.ids[2:]]
    assert tiny_tokenizer.decode(tokens.ids[2:]) == " b"


def test_the_end_token_is_learned_when_asked(tiny_tokenizer: Any):
    (tokens,) = encode(tiny_tokenizer, Example("Q", " b", end=True), "response", 100)
    assert tokens.labels[-1] == tiny_tokenizer.eos_token_id


def test_long_pairs_lose_the_prompts_beginning_and_long_text_is_cut(tiny_tokenizer: Any):
    (tokens,) = encode(tiny_tokenizer, Example("abcdefgh", " x"), "response", 6)
    assert tiny_tokenizer.decode(tokens.ids) == "efgh x"
    assert tokens.labels[:4] == [IGNORED] * 4
    pieces = encode(tiny_tokenizer, Example("", "abcdefgh"), "response", 4)
    assert [len(piece.ids) for piece in pieces] == [4, 4]  # <s>abc defg; the last single byte has nothing to learn
    assert all(piece.ids == piece.labels for piece in pieces)


def test_rows_hold_whole_examples_and_restart_positions():
    parts = [Tokens([1, 2, 3], [1, 2, 3]), Tokens([4, 5], [IGNORED, 5]), Tokens([6, 7, 8], [6, 7, 8])]
    first, second = pack(iter(parts), 6)
    assert first.ids == [1, 2, 3, 4, 5]
    assert first.positions == [0, 1, 2, 0, 1]
    assert first.labels == [IGNORED, 2, 3, IGNORED, 5]
    assert second.ids == [6, 7, 8]


def test_packed_examples_do_not_see_each_other(tiny_model: LlamaForCausalLM):
    parts = [Tokens(ids, ids) for ids in ([5, 9, 17, 30], [7, 8], [40, 41, 42, 43, 44])]
    (row,) = pack(iter(parts), 64)
    packed, count = row_loss(tiny_model, row)
    alone = [row_loss(tiny_model, next(pack(iter([part]), 64))) for part in parts]
    assert count == sum(number for _, number in alone) == 8
    torch.testing.assert_close(packed, sum(loss for loss, _ in alone), rtol=0, atol=1e-4)
    # and the loss of one alone is transformers' own
    ids = torch.tensor([parts[2].ids])
    torch.testing.assert_close(alone[2][0] / 4, tiny_model(input_ids=ids, labels=ids).loss, rtol=1e-5, atol=1e-5)


def test_sources_are_mixed_by_their_weights_in_tokens(tiny_tokenizer: Any):
    sources = [(3.0, [Example("", "a" * 9)]), (1.0, [Example("", "b" * 4)])]
    drawn = list(itertools.islice(mix(sources, tiny_tokenizer, "response", 64, 0), 400))
    totals = [sum(len(t.ids) for t in drawn if len(t.ids) == length) for length in (10, 5)]
    assert abs(totals[0] / totals[1] - 3) < 0.1


def test_the_mix_is_seeded_and_every_epoch_has_its_own_order(tiny_tokenizer: Any):
    sources = [(1.0, [Example("", letter * 3) for letter in "abcdefgh"])]
    first, again, other = (
        [t.ids for t in itertools.islice(mix(sources, tiny_tokenizer, "response", 64, seed), 16)] for seed in (0, 0, 1)
    )
    assert first == again != other
    assert sorted(first[:8]) == sorted(first[8:])
    assert first[:8] != first[8:]


def test_held_out_examples_are_not_trained_on():
    examples = [Example("", str(n)) for n in range(50)]
    ((_, training),), (held,) = hold_out([(1.0, examples)], 0.1, 0)
    assert len(held) == 5
    assert set(training) | set(held) == set(examples)
    assert not set(training) & set(held)

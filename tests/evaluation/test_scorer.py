"""The shared-prefix scorer against lm-eval's HFLM: every kind of request, random lengths, any batch and order."""

import copy
import random
from typing import Any

import datasets
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from evaluation import packing, passes, scorer
from evaluation.packing import pack
from evaluation.scorer import SharedPrefixLM

WORDS = ["the", "cat", "sees", "a", "dog", "near", "rivers", "and", "old", "trees"]


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=0) for given in arguments]  # type: ignore


def pair(model: Any, tokenizer: Any, **arguments: Any) -> tuple[Any, Any]:
    own = SharedPrefixLM(pretrained=model, tokenizer=tokenizer, **arguments)
    arguments.pop("tokens_per_batch", None)
    return own, HFLM(pretrained=model, tokenizer=tokenizer, batch_size=32, **arguments)


def agree(own: Any, reference: Any, arguments: list[tuple[str, str]]) -> None:
    found = own.loglikelihood(instances("loglikelihood", arguments), disable_tqdm=True)
    expected = reference.loglikelihood(instances("loglikelihood", arguments), disable_tqdm=True)
    assert own.way() in ("flat", "padded")
    for (value, greedy), (right, rightly) in zip(found, expected, strict=True):
        assert value == pytest.approx(right, abs=1e-3)
        assert greedy == rightly


def text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(words))


def items(chance: random.Random, prefix: str = "") -> list[tuple[str, str]]:
    """Questions with several answers, contexts that vary with the answer, answers of one token, repeats."""
    made: list[tuple[str, str]] = []
    for _ in range(chance.randint(2, 4)):
        context = prefix + text(chance, chance.randint(1, 12))
        choices = chance.randint(1, 4)
        made += [(context, " " + text(chance, chance.randint(1, 5))) for _ in range(choices)]
        made += [(f"{context} {word}", " is wet.") for word in chance.sample(WORDS, 2)]
        made += [(context, letter) for letter in "AB"]
    made += [("", "no context"), made[0], (made[0][0] + " ", "x")]
    chance.shuffle(made)
    return made


@pytest.fixture(params=["flat", "padded"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows end to end, as on a CPU, or beside each other, as elsewhere."""
    if request.param == "padded":
        monkeypatch.setitem(scorer.ATTENTION, "flat", ())
    return request.param


@pytest.mark.parametrize("seed", range(4))
def test_random_requests_equal_hflm(seed: int, way: str, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any):
    chance = random.Random(seed)
    own, reference = pair(tiny_model, tiny_tokenizer, tokens_per_batch=chance.choice([1, 100, 2048]))
    agree(own, reference, items(chance))


@pytest.mark.parametrize("seed", range(2))
def test_prefixes_of_a_whole_task_are_cached(
    seed: int, way: str, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    chance = random.Random(seed)
    own, reference = pair(tiny_model, tiny_tokenizer)
    assert own.way() == way
    stems: list[int] = []
    prefill = passes.prefill
    monkeypatch.setattr(passes, "prefill", lambda model, stem: stems.append(len(stem)) or prefill(model, stem))
    monkeypatch.setattr(packing, "ROW", 16)
    monkeypatch.setattr(packing, "STRANGERS", 64)
    shots = [f"{text(chance, 14)}\n\n" for _ in range(2)]
    agree(own, reference, items(chance, shots[0]) + items(chance, shots[1]))
    assert len(stems) >= 2
    assert min(stems) >= min(map(len, shots))


def test_nothing_shared_runs_without_a_mask_and_all_shared_runs_once(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    own, _ = pair(tiny_model, tiny_tokenizer)
    assert own.way() == "flat"
    tokens: list[int] = []
    flat = passes.flat
    monkeypatch.setattr(
        passes,
        "flat",
        lambda model, batch, cache: tokens.extend(len(r.tokens) for r in batch) or flat(model, batch, cache),
    )
    own.loglikelihood(instances("loglikelihood", [("abcdefgh", " yes"), ("abcdefgh", " no")]), disable_tqdm=True)
    assert tokens == [
        1 + 8 + len(" ye") + len("n")
    ]  # BOS, context, and the answers but for their last tokens; " " once
    rows = pack([(1, 2, 3), (4, 5)], [2, 1])
    assert [row.chain for row in rows] == [True, True]


def test_answers_do_not_depend_on_batch_size_or_order(way: str, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any):
    arguments = items(random.Random(9))
    backwards = arguments[::-1]
    one, _ = pair(tiny_model, tiny_tokenizer, tokens_per_batch=1)
    many, _ = pair(tiny_model, tiny_tokenizer, tokens_per_batch=4096)
    first = one.loglikelihood(instances("loglikelihood", arguments), disable_tqdm=True)
    second = many.loglikelihood(instances("loglikelihood", backwards), disable_tqdm=True)[::-1]
    for (left, greedy), (right, rightly) in zip(first, second, strict=True):
        assert left == pytest.approx(right, abs=1e-4)
        assert greedy == rightly


@pytest.mark.parametrize("bos", [True, False, None])
def test_long_contexts_lose_their_left_and_are_counted(
    bos: bool | None, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any
):
    own, reference = pair(tiny_model, tiny_tokenizer, add_bos_token=bos)
    long = "word " * 60  # 300 bytes, 256 positions
    agree(own, reference, [(long, "yes"), (long, "no"), (long[:200], "maybe"), (long, "perhaps so")])
    assert own.truncated == 3


def test_a_continuation_that_cannot_be_scored_is_named(tiny_model: LlamaForCausalLM, tiny_tokenizer: Any):
    own, _ = pair(tiny_model, tiny_tokenizer)
    for continuation, count in (("", 0), ("x" * 300, 300)):
        with pytest.raises(ValueError, match=f"a continuation of {count} tokens cannot be scored .*'context'"):
            own.loglikelihood(instances("loglikelihood", [("context", continuation)]), disable_tqdm=True)


def test_rolling_and_generation_equal_hflm(tiny_model: LlamaForCausalLM, tiny_tokenizer: Any):
    own, reference = pair(tiny_model, tiny_tokenizer)
    texts = [("a short text",), ("word after word " * 40,), ("x",)]
    found = own.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    assert found == pytest.approx(
        reference.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True), abs=1e-2
    )
    asked = [("the cat", {"until": ["\n"], "max_gen_toks": 5}), ("a dog runs", {"until": ["\n"], "max_gen_toks": 5})]
    assert own.generate_until(instances("generate_until", asked), disable_tqdm=True) == reference.generate_until(
        instances("generate_until", asked), disable_tqdm=True
    )


def test_non_uniform_and_16_bit_and_eager_models_pack(tiny_model: LlamaForCausalLM, tiny_tokenizer: Any):
    from pruning.modeling_regrow import RegrowForCausalLM, RegrowQwen2ForCausalLM, RegrowQwen3ForCausalLM

    names = "vocab_size hidden_size num_hidden_layers head_dim max_position_embeddings num_attention_heads"
    names += " num_key_value_heads intermediate_size"
    said = {name: getattr(tiny_model.config, name) for name in names.split()}
    first = {"intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1}
    layers = {0: first, 1: {"intermediate_size": 31}}
    for made in (RegrowForCausalLM, RegrowQwen2ForCausalLM, RegrowQwen3ForCausalLM):
        torch.manual_seed(1)
        model: Any = made(made.config_class(**said, per_layer_config=layers)).eval()
        own, reference = pair(model, tiny_tokenizer)
        agree(own, reference, items(random.Random(3)))
        assert own.way() == "flat"
        assert model.config._attn_implementation == "sdpa"
    tiny_model.set_attn_implementation("eager")
    agree(*pair(tiny_model, tiny_tokenizer), items(random.Random(4)))
    own, _ = pair(copy.deepcopy(tiny_model).to(torch.bfloat16), tiny_tokenizer)
    assert own.way() == "padded"


def test_models_that_cannot_pack_run_as_hflm_runs_them(tiny_tokenizer: Any):
    from pruning.modeling_regrow import RegrowMistralConfig, RegrowMistralForCausalLM

    torch.manual_seed(2)
    size = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sliding = MistralForCausalLM(
        MistralConfig(**size, num_key_value_heads=2, sliding_window=16, max_position_embeddings=256)
    ).eval()
    narrow = {"per_layer_config": {0: {"intermediate_size": 20}}, "num_key_value_heads": 2}
    free = RegrowMistralForCausalLM(
        RegrowMistralConfig(**size, **narrow, sliding_window=16, max_position_embeddings=256)
    ).eval()
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**size, max_position_embeddings=256)).eval()
    short, _ = pair(sliding, tiny_tokenizer, max_length=10)
    assert short.way() == "flat"  # the window holds all that is asked: it says nothing of longer requests
    for model, way in ((sliding, "alone"), (free, "alone"), (neox, "flat")):
        own, reference = pair(model, tiny_tokenizer)
        arguments = items(random.Random(5))
        found = own.loglikelihood(instances("loglikelihood", arguments), disable_tqdm=True)
        expected = reference.loglikelihood(instances("loglikelihood", arguments), disable_tqdm=True)
        assert own.way() == way
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)


def test_a_model_that_ignores_positions_is_found_out(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    decoder = tiny_model.get_decoder()
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda *args, position_ids=None, **rest: forward(*args, **rest))
    torch.nn.init.normal_(decoder.layers[0].self_attn.q_proj.weight, std=1.0)
    own, reference = pair(tiny_model, tiny_tokenizer)
    arguments = items(random.Random(6))
    found = own.loglikelihood(instances("loglikelihood", arguments), disable_tqdm=True)
    assert own.way() == "alone"
    expected = reference.loglikelihood(instances("loglikelihood", arguments), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


def test_lm_eval_knows_it_by_name(tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, tmp_path: Any):
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    rows = [{"q": f"what is {n}", "c": ["one", "two more"], "label": n % 2} for n in range(6)]
    table = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
    task = {
        "task": "made_up", "dataset_path": "json", "custom_dataset": lambda **_: table, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}", "doc_to_target": "label",
        "num_fewshot": 2, "fewshot_split": "test",
    }  # fmt: skip
    found = {}
    for name in ("regrow", "hf"):
        given = {"pretrained": str(tmp_path), "device": "cpu", "dtype": "float32"}
        manager = TaskManager(include_defaults=False)
        outcome: Any = simple_evaluate(name, given, [dict(task)], task_manager=manager, bootstrap_iters=0)
        found[name] = [float(r[0]) for s in outcome["samples"]["made_up"] for r in s["filtered_resps"]]
    assert found["regrow"] == pytest.approx(found["hf"], abs=1e-3)


def test_batches_are_the_cheapest_that_hold_the_budget():
    """Against every way to cut a short list."""
    chance, budget = random.Random(7), 64

    def cost(cut: list[list[int]]) -> float:
        fits = all(len(part) == 1 or len(part) * part[0] <= budget for part in cut)
        return sum(len(part) * part[0] + budget * packing.PASS for part in cut) if fits else float("inf")

    for _ in range(20):
        widths = sorted((chance.randint(1, 30) for _ in range(7)), reverse=True)
        rows = pack([tuple(1000 * n + k for k in range(w)) for n, w in enumerate(widths)], [w - 1 for w in widths])
        ways: list[float] = []
        for bits in range(2 ** (len(widths) - 1)):
            cut = [[widths[0]]]
            for place, width in enumerate(widths[1:]):
                if bits >> place & 1:
                    cut.append([width])
                else:
                    cut[-1].append(width)
            ways.append(cost(cut))
        made = packing.batches(rows, budget, 2**20)
        assert cost([[len(row.tokens) for row in batch] for batch in made]) == pytest.approx(min(ways))
        assert sorted(len(row.tokens) for batch in made for row in batch) == sorted(widths)

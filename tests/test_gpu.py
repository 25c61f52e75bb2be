"""What a GPU computes against what the CPU does. Skipped where there is none, as in CI: for a machine that has one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evaluation.perplexity import perplexity
from evaluation.scorer import SharedPrefixLM
from pruning import criteria
from pruning.prune import prune
from recovery import adapters, inject
from recovery.config import RecoveryConfig
from recovery.data import Example
from recovery.merge import merge
from recovery.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SOURCES = [(1.0, [Example(f"the number {n}", f" follows {n - 1}") for n in range(60)])]
IDS = torch.randint(4, 200, (3, 12), generator=torch.Generator().manual_seed(1))


def settings(method: str, **options: Any) -> RecoveryConfig:
    config = adapters.load(method).Config
    own = {"rank": 4, "a": 16, "b": 16, **({"fused": False} if "quantized_base" in options else {})}
    adapter = {"method": method, **{name: value for name, value in own.items() if name in config.model_fields}}
    values: dict[str, Any] = {"tokens": 1500, "batch_tokens": 256, "max_length": 64, "learning_rate": 1e-3}
    return RecoveryConfig(adapter=adapter, **{**values, "validation": {"fraction": 0.1, "tokens": 100}, **options})


def trained(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: RecoveryConfig, folder: Path, device: str
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    folder /= str(len(list(folder.iterdir())))
    folder.mkdir()
    made = copy.deepcopy(model).to(device)  # pyright: ignore[reportArgumentType]
    return made, train(made, tokenizer, SOURCES, config, folder, device=device)


@pytest.mark.parametrize("method", adapters.names())
def test_an_adapter_is_trained_and_merged_alike(
    method: str, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found: list[dict[str, Any]] = []
    logits: list[torch.Tensor] = []
    before = tiny_model(IDS).logits
    for device in ("cpu", "cuda"):
        model, report = trained(tiny_model, tiny_tokenizer, settings(method), tmp_path, device)
        found.append(report)
        merged, difference = merge(model, IDS)
        assert difference is not None
        assert difference < 1e-4
        logits.append(merged(IDS.to(device)).logits.cpu())
    assert [each["tokens"] for each in found] == [found[0]["tokens"]] * 2
    # AdamW's first steps go by the sign of a gradient, however small; Flat-LoRA draws noise on the device.
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=2e-3)
    assert found[1]["validation"][-1]["loss"] == pytest.approx(found[0]["validation"][-1]["loss"], rel=2e-3)
    assert (logits[1] - logits[0]).norm() < 0.05 * (logits[0] - before).norm()


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["lora", "randlora"])
def test_a_base_of_few_bits_trains_alike(
    method: str, scheme: str, tiny_config: LlamaConfig, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**tiny_config.to_dict(), "hidden_size": 64, "intermediate_size": 75}))
    config = settings(method, quantized_base=scheme)
    reports = [trained(model, tiny_tokenizer, config, tmp_path, device)[1] for device in ("cpu", "cuda")]
    assert reports[1]["loss"] == pytest.approx(reports[0]["loss"], rel=2e-3)
    for name in ("rounding", "bytes"):
        assert reports[1]["quantized_base"][name] == pytest.approx(reports[0]["quantized_base"][name], rel=1e-3)


@pytest.mark.parametrize("method", criteria.names())
def test_a_criterion_keeps_the_same(method: str, tiny_model: LlamaForCausalLM) -> None:
    structures = ("layers",) if method in ("block_influence", "shortened") else ("ffn", "attention")
    options: dict[str, Any] = (
        {"compensation": "none"} if structures == ("layers",) else {"compensation": "least_squares"}
    )
    config = criteria.load(method).Config(
        ratio=0.2, structures=structures, shape="free", protect={"first": 0, "last": 0}, **options
    )
    ids = torch.randint(4, 200, (16, 32), generator=torch.Generator().manual_seed(1))
    results = [prune(copy.deepcopy(tiny_model).to(device), ids, config) for device in ("cpu", "cuda")]
    assert results[1].kept == results[0].kept
    there, here = (result.model(IDS.to(result.model.device)).logits.cpu() for result in reversed(results))
    torch.testing.assert_close(there, here, rtol=0, atol=2e-3)


def test_scores_are_hflms_on_the_cpu(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    asked = [(f"{start} the cat", f" sees {word}") for start in ("then", "now") for word in ("a dog", "rain", "x")]
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in asked]
    expected = HFLM(pretrained=tiny_model, tokenizer=tiny_tokenizer).loglikelihood(requests, disable_tqdm=True)
    text = "the cat sees a dog near rivers. " * 20
    plain = perplexity(tiny_model, tiny_tokenizer, [text], window=64, tokens=256)["perplexity"]
    model: Any = tiny_model.cuda()
    own = SharedPrefixLM(pretrained=model, tokenizer=tiny_tokenizer)
    assert own.way() == "padded"
    for (value, greedy), (right, rightly) in zip(own.loglikelihood(requests, disable_tqdm=True), expected, strict=True):
        assert value == pytest.approx(right, abs=1e-3)
        assert greedy == rightly
    found = perplexity(model, tiny_tokenizer, [text], window=64, tokens=256)["perplexity"]
    assert found == pytest.approx(plain, rel=1e-5)


def test_an_adapter_trained_there_computes_the_same_here(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, _ = trained(tiny_model, tiny_tokenizer, settings("randlora"), tmp_path, "cuda")
    inject.save(model, tmp_path / "adapter", 0)
    inject.attach_saved(tiny_model, tmp_path / "adapter")
    torch.testing.assert_close(tiny_model(IDS).logits, model(IDS.cuda()).logits.cpu(), rtol=0, atol=1e-4)

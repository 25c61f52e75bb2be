"""PEFT's files: what ours writes PEFT reads to the same logits, and the other way round."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from recovery import adapters, inject, peft_format, peft_read, peft_write
from recovery.merge import merge

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(4, 260, (2, 20), generator=torch.Generator().manual_seed(4))


def shake(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"method": name, "rank": 4}
            for name in ("lora", "rora", "dora", "edora", "melora", "nola", "vera", "flat_lora", "gelora")
        ),
        {"method": "rora", "rank": 4, "rank_pattern": {"up_proj": 6}, "alpha_pattern": {"o_proj": 5}},
        {"method": "randlora", "rank": 5, "pairing": "peft"},
        {"method": "randlora", "rank": 5, "pairing": "peft", "bases": "very_sparse"},
        {"method": "lora_mini", "rank": 4, "a": 8, "b": 8},
        {"method": "sora", "rank": 4, "targets": ("q_proj", "mlp.down_proj")},
        {"method": "increlora", "rank": 2},
    ],
    ids=str,
)
def test_peft_loads_what_ours_writes(options: dict[str, Any], tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    plain, other, cut = (copy.deepcopy(tiny_model) for _ in range(3))
    inject.attach(tiny_model, adapters.load(options["method"]).Config(**options), seed=0)
    shake(inject.trainable(tiny_model).values())
    if options["method"] == "sora":
        for module in inject.adapted(tiny_model).values():
            module.method.trainable["gate"].data[1] = 0
    peft_write.write(tiny_model, tmp_path, "pruned")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    wanted = tiny_model(IDS).logits
    torch.testing.assert_close(theirs(input_ids=IDS).logits, wanted, rtol=0, atol=1e-5)
    peft_read.attach(other, tmp_path)
    torch.testing.assert_close(other(IDS).logits, wanted, rtol=0, atol=1e-5)
    if options["method"] == "sora":
        assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
    merged, _ = merge(other)
    with pytest.raises(ValueError, match="trained on other weights"):
        peft_read.attach(merged, tmp_path)
    assert not inject.adapted(merged)
    cut.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 70, bias=False)  # whether it has an adapter or not
    with pytest.raises(ValueError, match=r"other weights|another pruned model|this model needs"):
        peft_read.attach(cut, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, rank_pattern={"up_proj": 6, "k_proj": 2}),
        peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], use_rslora=True, alpha_pattern={"q_.*": 3}),
        peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, use_dora=True, use_rslora=True),
        peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=peft.EvaConfig()),
        peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="mica"),
        peft.VeraConfig(r=6, target_modules=TARGETS),
        peft.RandLoraConfig(r=5, target_modules=TARGETS, randlora_alpha=10),
        peft.RandLoraConfig(r=5, target_modules=TARGETS, randlora_alpha=10, sparse=True),
    ],
    ids=lambda settings: f"{settings.peft_type.value}-{getattr(settings, 'use_dora', '')}",
)
def test_ours_reads_what_peft_writes(settings: Any, tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    theirs: Any = peft.get_peft_model(copy.deepcopy(tiny_model), settings).eval()  # type: ignore
    shake(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path)
    names = peft_read.attach(tiny_model, tmp_path)
    assert len(names) == 2 * len(settings.target_modules)
    wanted = theirs(input_ids=IDS).logits
    torch.testing.assert_close(tiny_model(IDS).logits, wanted, rtol=0, atol=1e-5)
    merged, difference = merge(tiny_model, IDS)
    assert difference is not None
    assert difference < 1e-5
    torch.testing.assert_close(merged(IDS).logits, theirs.merge_and_unload()(IDS).logits, rtol=0, atol=1e-5)


def test_a_bfloat16_file_is_read_exactly(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    settings = peft.RandLoraConfig(r=5, target_modules=TARGETS, randlora_alpha=10)
    theirs: Any = peft.get_peft_model(copy.deepcopy(tiny_model), settings).eval()  # type: ignore
    shake(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(tiny_model), tmp_path).eval()
    peft_read.attach(tiny_model, tmp_path)
    torch.testing.assert_close(tiny_model(IDS).logits, again(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_what_cannot_be_read_exactly_is_refused(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    def saved(name: str, settings: Any) -> Path:
        peft.get_peft_model(copy.deepcopy(tiny_model), settings).save_pretrained(tmp_path / name)  # type: ignore
        return tmp_path / name

    cases = [
        (saved("bias", peft.LoraConfig(target_modules=TARGETS, bias="all")), "bias: all"),
        (saved("ia3", peft.IA3Config(target_modules=TARGETS, feedforward_modules=[])), "PEFT type 'IA3'"),
        (saved("head", peft.LoraConfig(target_modules=TARGETS, modules_to_save=["lm_head"])), "modules_to_save"),
        (saved("vera", peft.VeraConfig(r=4, target_modules=TARGETS, save_projection=False)), "save_projection=True"),
        (saved("lm_head", peft.LoraConfig(target_modules=["lm_head"])), "lm_head.*not a linear layer's part"),
        (tmp_path / "nowhere", "has no adapter_config.json"),
    ]
    pickled = saved("pickled", peft.LoraConfig(target_modules=TARGETS))
    (pickled / peft_format.WEIGHTS).rename(pickled / "adapter_model.bin")
    cases.append((pickled, "unpickles nothing"))
    pissa = saved("pissa", peft.LoraConfig(target_modules=TARGETS))
    said = json.loads((pissa / "adapter_config.json").read_text())
    (pissa / "adapter_config.json").write_text(json.dumps({**said, "init_lora_weights": "pissa"}))
    cases.append((pissa, "changed the base's weights"))
    for folder, message in cases:
        with pytest.raises(ValueError, match=message):
            peft_read.attach(tiny_model, folder)
        assert not inject.adapted(tiny_model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mora"}, "no form of mora"),
        ({"method": "randlora", "rank": 4}, "pairing: peft"),
        ({"method": "randlora", "rank": 4, "pairing": "peft", "rank_pattern": {"q_proj": 2}}, "one rank and alpha"),
    ],
)
def test_what_peft_has_no_form_for(
    options: dict[str, Any], message: str, tiny_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    inject.attach(tiny_model, adapters.load(options["method"]).Config(**options), seed=0)
    with pytest.raises(ValueError, match=message):
        peft_write.write(tiny_model, tmp_path / "peft", "pruned")
    assert not (tmp_path / "peft").exists()

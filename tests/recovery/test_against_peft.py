"""Adapters against PEFT: the same weights put into both give the same logits and gradients."""

import copy
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaForCausalLM

from recovery import adapters, inject

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PARTS = {
    "A": "lora_A.default.weight",
    "B": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
}


def shake(model: LlamaForCausalLM) -> dict[str, torch.nn.Parameter]:
    """Random values for every parameter of ours."""
    generator = torch.Generator().manual_seed(3)
    parameters = inject.trainable(model)
    for parameter in parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return parameters


def logits_and_gradients(model: Any, wanted: dict[str, Any], vocabulary: int) -> tuple[torch.Tensor, dict[str, Any]]:
    ids = torch.randint(4, vocabulary, (2, 20), generator=torch.Generator().manual_seed(4))
    output = model(input_ids=ids, labels=ids)
    gradients = torch.autograd.grad(output.loss, list(wanted.values()))
    return output.logits, dict(zip(wanted, gradients, strict=True))


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"method": "lora", "rank": 4, "alpha": 12}, {}),
        ({"method": "rora", "rank": 4, "alpha": 12}, {"use_rslora": True}),
        ({"method": "dora", "rank": 4, "alpha": 12}, {"use_dora": True}),
        (
            {"method": "rora", "rank": 4, "alpha": 12, "rank_pattern": {"up_proj": 6}, "alpha_pattern": {"o_proj": 5}},
            {"use_rslora": True, "rank_pattern": {"up_proj": 6}, "alpha_pattern": {"o_proj": 5}},
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if "method" in value else "",
)
def test_low_rank_family(options: dict[str, Any], theirs: dict[str, Any], tiny_model: LlamaForCausalLM) -> None:
    settings = peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, lora_dropout=0.0, **theirs)
    reference = peft.get_peft_model(copy.deepcopy(tiny_model), settings).eval()  # type: ignore
    inject.attach(tiny_model, adapters.load(options["method"]).Config(**options), seed=0)
    ours = inject.trainable(tiny_model)
    found = dict(reference.named_parameters())
    names = {name: f"base_model.model.{name.rpartition('.')[0]}.{PARTS[name.rpartition('.')[2]]}" for name in ours}
    assert set(names.values()) == {name for name, parameter in found.items() if parameter.requires_grad}
    for name, parameter in ours.items():
        assert parameter.shape == found[names[name]].shape
        if name.endswith("magnitude"):  # starts at the same rows' norms
            torch.testing.assert_close(parameter.data, found[names[name]].data, rtol=1e-6, atol=1e-6)
    shake(tiny_model)
    for name, parameter in ours.items():
        found[names[name]].data.copy_(parameter.data)
    wanted = {name: found[names[name]] for name in ours}
    vocabulary = tiny_model.config.vocab_size
    logits, gradients = logits_and_gradients(tiny_model, ours, vocabulary)
    their_logits, their_gradients = logits_and_gradients(reference, wanted, vocabulary)
    torch.testing.assert_close(logits, their_logits, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_randlora(tiny_model: LlamaForCausalLM) -> None:
    """With PEFT's bases and pairing; PEFT's scale lacks 1/sqrt(n), which differs by layer: its lambda takes it in."""
    rank = 5  # 32 and 16 are not multiples of it
    settings = peft.RandLoraConfig(
        r=rank, randlora_alpha=2 * rank, target_modules=TARGETS, randlora_dropout=0.0, projection_prng_key=1
    )
    reference = peft.get_peft_model(copy.deepcopy(tiny_model), settings).eval()  # type: ignore
    inject.attach(tiny_model, adapters.load("randlora").Config(rank=rank, pairing="peft"), seed=0)
    shared = next(iter(inject.adapted(tiny_model).values())).method.shared
    for name, layer in inject.adapted(tiny_model).items():
        module = reference.get_submodule(f"base_model.model.{name}")
        parameters = layer.adapter
        assert torch.equal(parameters["lambda"].T, module.randlora_lambda["default"])  # the same start
        assert torch.equal(parameters["gamma"], module.randlora_gamma["default"])
    ours = shake(tiny_model)
    first: Any = reference.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    # PEFT sizes by the largest in and out, we by the largest smaller and larger side: ours are parts of PEFT's.
    shared.bases["A"].copy_(first.randlora_A["default"][:, 0, :32])
    shared.bases["B"].copy_(first.randlora_B["default"][:48, : shared.bases["B"].shape[1]])
    wanted: dict[str, torch.nn.Parameter] = {}
    for name, layer in inject.adapted(tiny_model).items():
        module: Any = reference.get_submodule(f"base_model.model.{name}")
        scales, gamma = layer.adapter["lambda"], layer.adapter["gamma"]
        module.randlora_lambda["default"].data.copy_(scales.data.T / len(scales) ** 0.5)
        module.randlora_gamma["default"].data.copy_(gamma.data)
        wanted[f"{name}.lambda"] = module.randlora_lambda["default"]
        wanted[f"{name}.gamma"] = module.randlora_gamma["default"]
    vocabulary = tiny_model.config.vocab_size
    logits, gradients = logits_and_gradients(tiny_model, {name: ours[name] for name in wanted}, vocabulary)
    their_logits, their_gradients = logits_and_gradients(reference, wanted, vocabulary)
    torch.testing.assert_close(logits, their_logits, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        theirs = their_gradients[name]
        theirs = theirs.T / len(gradient) ** 0.5 if name.endswith("lambda") else theirs
        torch.testing.assert_close(gradient, theirs, rtol=1e-3, atol=1e-6, msg=name)


def test_vera(tiny_model: LlamaForCausalLM) -> None:
    settings = peft.VeraConfig(r=6, target_modules=TARGETS, vera_dropout=0.0, d_initial=0.1)
    reference = peft.get_peft_model(copy.deepcopy(tiny_model), settings).eval()  # type: ignore
    inject.attach(tiny_model, adapters.load("vera").Config(rank=6), seed=0)
    first: Any = reference.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    bases = next(iter(inject.adapted(tiny_model).values())).method.shared.bases
    for name, theirs in (("A", first.vera_A["default"]), ("B", first.vera_B["default"])):
        assert bases[name].shape == theirs.shape
        torch.testing.assert_close(bases[name].abs().max(), theirs.abs().max(), rtol=0.05, atol=0)  # the same bound
        bases[name].copy_(theirs)
    wanted: dict[str, torch.nn.Parameter] = {}
    names = {"b": "vera_lambda_b", "v": "vera_lambda_d"}
    start = {name: parameter.data.clone() for name, parameter in inject.trainable(tiny_model).items()}
    ours = shake(tiny_model)
    for name, parameter in ours.items():
        layer, _, part = name.rpartition(".")
        theirs: Any = reference.get_submodule(f"base_model.model.{layer}")
        wanted[name] = getattr(theirs, names[part])["default"]
        assert torch.equal(start[name], wanted[name].data)
        wanted[name].data.copy_(parameter.data)
    vocabulary = tiny_model.config.vocab_size
    logits, gradients = logits_and_gradients(tiny_model, ours, vocabulary)
    their_logits, their_gradients = logits_and_gradients(reference, wanted, vocabulary)
    torch.testing.assert_close(logits, their_logits, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-3, atol=1e-6, msg=name)


def test_paper_and_peft_pairing_differ(tiny_model: LlamaForCausalLM) -> None:
    """The same numbers in both orders are two functions: an adapter must say which one it is."""
    other = copy.deepcopy(tiny_model)
    for model, pairing in ((tiny_model, "paper"), (other, "peft")):
        inject.attach(model, adapters.load("randlora").Config(rank=4, pairing=pairing), seed=0)
        shake(model)
    first, second = (next(iter(inject.adapted(model).values())).delta() for model in (tiny_model, other))
    assert (first - second).abs().max() > 0.1 * first.abs().max()

"""`recovery: {adapter: {from: path:FOLDER}}`: a trained adapter is merged and scored, nothing trained."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pipeline.cli import main
from pipeline.plan import label_of
from pruning import checkpoint
from recovery.adapters import lora

IDS = torch.randint(4, 260, (2, 20), generator=torch.Generator().manual_seed(4))
LORA = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 6})
TEXTS = [f"the {a} cat sees a {b} near the {c}" for a in ("red", "old") for b in ("bird", "tree") for c in "nmk"]


@pytest.fixture
def world(tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, text and `run.yaml` that reads the adapter in `lora`; it is the current folder."""
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tiny_model, tiny_tokenizer, tmp_path / "dense")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    text = {"source": "path:text.jsonl", "field": "text"}
    write(
        name="small",
        model={"source": "path:dense", "dtype": "float32"},
        pruning={"method": "llm_pruner", "ratio": 0.1, "calibration": {**text, "samples": 4, "length": 12}},
        recovery={"adapter": {"from": "path:lora"}},
        evaluation={"perplexity": [{**text, "name": "text", "window": 16}]},
    )
    return tmp_path


def write(**changes: Any) -> None:
    file = Path("run.yaml")
    config = yaml.safe_load(file.read_text()) if file.exists() else {}
    file.write_text(yaml.safe_dump({**config, **changes}))


def regrow(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def run(*words: str) -> dict[str, str]:
    """Each step's status."""
    result = regrow("run", "run.yaml", "--json", *words)
    assert result.exit_code == 0, result.output
    return {label_of(entry): entry["status"] for entry in json.loads(result.stdout)["stages"]}


def made_with_peft(base: str, folder: str, settings: Any = LORA, seed: int = 3) -> Any:
    """A PEFT adapter of random values for the model in `base`, saved in `folder`, on that model."""
    theirs: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.copy(settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(folder)
    return theirs


def logits(folder: str) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits.detach()


ARTIFACTS = "runs/small/artifacts"


def test_a_peft_adapter_is_merged_scored_and_exported(world: Path):
    made_with_peft("dense", "lora")  # any: pruning does not look at it
    assert set(run("--until", "prune")) == {"statistics gradients", "prune"}
    theirs = made_with_peft(f"{ARTIFACTS}/prune/model", "lora")
    write(export=["hf", "peft"])
    built = {label for label, status in run().items() if status == "built"}
    assert built == {"merge", *(f"evaluate {name} text" for name in ("dense", "pruned", "recovered")),
                     "export hf", "export peft"}  # fmt: skip
    wanted = theirs(input_ids=IDS).logits.detach()
    assert (wanted - logits(f"{ARTIFACTS}/prune/model")).abs().max() > 0.01
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(f"{ARTIFACTS}/prune/model"), f"{ARTIFACTS}/export-peft"
    )
    torch.testing.assert_close(again.eval()(input_ids=IDS).logits.detach(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        logits(f"{ARTIFACTS}/merge/model"), theirs.merge_and_unload()(IDS).logits.detach(), rtol=0, atol=1e-5
    )

    manifest = json.loads(Path(ARTIFACTS, "merge/manifest.json").read_text())
    assert manifest["report"]["adapter"] == {"folder": "lora", "layers": 4}
    assert manifest["report"]["largest_logit_difference"] < 1e-4
    assert manifest["report"]["tokens_compared"] == 256
    for form, words in (("hf", "structurally pruned, recovered with an adapter, merged"), ("peft", "an adapter for a")):
        card = Path(ARTIFACTS, f"export-{form}/README.md").read_text()
        assert words in card
        assert f"`lora` (peft files, method lora, sha256 {manifest['material']['adapter']['sha256'][:16]})" in card
    assert set(run().values()) == {"cached"}

    made_with_peft(f"{ARTIFACTS}/prune/model", "lora", seed=5)
    steps = json.loads(regrow("plan", "run.yaml", "--json").stdout)["steps"]
    whys = {label_of({**step}): step["why"] for step in steps if step["status"] == "build"}
    assert set(whys) == {"merge", "evaluate recovered text", "export hf", "export peft"}
    assert whys["merge"].startswith("adapter.sha256: ")


def test_an_adapter_of_regrows_own_gives_the_model_of_its_run(world: Path):
    data = [{"source": "path:text.jsonl", "field": "text"}]
    training = {"tokens": 256, "batch_tokens": 128, "max_length": 64, "learning_rate": 1e-2, "data": data}
    write(recovery={"adapter": {"method": "mora", "rank": 4}, **training})
    assert "recover" in run("--until", "merge")
    trained = logits(f"{ARTIFACTS}/merge/model")
    shutil.copytree(f"{ARTIFACTS}/recover/adapter", "own")
    write(name="other", recovery={"adapter": {"from": "path:own"}})
    assert run("--until", "merge") == {"statistics gradients": "cached", "prune": "cached", "merge": "built"}
    assert torch.equal(logits("runs/other/artifacts/merge/model"), trained)

    refused = regrow("run", "run.yaml", "--set", "export=[peft]")
    assert refused.exit_code == 2
    assert "export: PEFT has no form of mora" in refused.stderr
    write(pruning=None)  # of other weights
    stranger = regrow("run", "run.yaml")
    assert stranger.exit_code == 1
    assert "merge failed" in stranger.stderr
    assert "belongs to another pruned model" in stranger.stderr
    parent = regrow("plan", "run.yaml", "--set", f"recovery.adapter.from=path:{ARTIFACTS}/recover")
    assert "holds no adapter" in parent.stderr
    assert f"did you mean {ARTIFACTS}/recover/adapter?" in parent.stderr


def test_a_dense_model_takes_an_adapter_as_well(world: Path):
    theirs = made_with_peft("dense", "lora", peft.LoraConfig(r=2, use_rslora=True, target_modules=["v_proj"]))
    write(pruning=None, export=["hf"])
    assert list(run()) == ["merge", "evaluate dense text", "evaluate recovered text", "export hf"]
    merged = theirs.merge_and_unload()(IDS).logits.detach()
    torch.testing.assert_close(logits(f"{ARTIFACTS}/merge/model"), merged, rtol=0, atol=1e-5)
    card = Path(ARTIFACTS, "export-hf/README.md").read_text()
    assert "Made with regrow: a LLaMA-family model, recovered with an adapter, merged." in card
    assert "method rora" in card


def spoiled(what: str) -> None:
    file, weights = Path("lora/adapter_config.json"), Path("lora/adapter_model.safetensors")
    if what == "pickle":
        weights.rename("lora/adapter_model.bin")
    elif what == "half":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "json":
        file.write_text("{")
    elif what == "empty":
        file.unlink()
    elif what == "file":
        shutil.rmtree("lora")
        Path("lora").write_text("")
    elif what == "gone":
        shutil.rmtree("lora")
    elif what == "head":
        made_with_peft("dense", "lora", peft.LoraConfig(target_modules=["lm_head"]))
    elif what == "part":
        tensors = load_file(weights)
        tensors.pop(next(name for name in tensors if name.endswith("lora_B.weight")))
        save_file(tensors, weights)
    elif what == "own":
        said: dict[str, Any] = {"format": 1, "config": {"method": "lora"}}
        Path("lora/adapter.json").write_text(json.dumps(said))
    elif what == "own config":
        said = {"format": 1, "config": {"method": "lora", "rank": 0}, "method_version": lora.VERSION, "seed": 0}
        said |= {"bases_sha256": "", "base_sample_sha256": ""}
        Path("lora/adapter.json").write_text(json.dumps(said))
    else:
        said = json.loads(file.read_text())
        file.write_text(json.dumps({**said, **json.loads(what)}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pickle", "it has no adapter_model.safetensors; regrow unpickles nothing: save it as safetensors"),
        ("half", "adapter_model.safetensors: not a whole safetensors file"),
        ("json", "adapter_config.json: not JSON"),
        ("empty", "holds no adapter: neither adapter.json nor adapter_config.json"),
        ("file", "holds no adapter"),
        ("gone", "no such file or folder"),
        ("head", "base_model.model.lm_head.base_layer.weight: not a linear layer's part of this method"),
        ("own", "adapter.json: it does not say method_version, seed"),
        ("own config", "adapter.json: its config is not one of lora's"),
        ("part", "lora/adapter_model.safetensors: it has no model.layers."),
        ('{"lora_alpha": 0}', "Input should be greater than 0 (got 0)"),
        ('{"alpha_pattern": {"*": 3}}', "alpha_pattern: {'*': 3} cannot be read"),
        ('{"alpha_pattern": ["q_proj"]}', "alpha_pattern: ['q_proj'] cannot be read"),
        ('{"peft_type": "IA3"}', "PEFT type 'IA3'; LORA, VERA and RANDLORA are read"),
        ('{"bias": "all"}', "bias: all: not served; merge it with PEFT"),
    ],
)
def test_a_folder_that_cannot_be_read_is_told_before_any_work(world: Path, what: str, message: str):
    made_with_peft("dense", "lora")
    spoiled(what)
    result = regrow("run", "run.yaml")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not list((world / "store").glob("[!.]*"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "adapter.method=lora",
            "recovery.adapter.method: an adapter that is read has a method already",
        ),
        (
            "adapter.rank=4",
            "recovery.adapter.rank: means nothing beside adapter.from: nothing is trained",
        ),
        ("tokens=4096", "recovery.tokens: means nothing beside adapter.from"),
        ("data=[]", "recovery.data: means nothing beside adapter.from"),
        ("distillation={}", "recovery.distillation: means nothing beside adapter.from"),
        ("adapter.from=null", "recovery.adapter.from: missing; write path:FOLDER"),
        ("adapter.from=lora", "recovery.adapter.from: 'lora': a source begins with one of"),
        ("adapter.from=hub:me/lora", "recovery.adapter.from: an adapter is read from a folder here, path:FOLDER"),
    ],
)
def test_what_means_nothing_beside_it_is_named(world: Path, override: str, message: str):
    result = regrow("run", "run.yaml", "--set", f"recovery.{override}")
    assert result.exit_code == 2
    assert f"run.yaml: {message}" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1

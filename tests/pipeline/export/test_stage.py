"""`regrow export`: the cached stage of a config, and any model folder."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from gguf import GGUFWriter, RopeScalingType
from safetensors.torch import load_file, save_file

from pipeline.cli import main
from pipeline.config_file import check
from pipeline.errors import ConfigError, SourceError
from pipeline.export import command, gguf
from pipeline.export.lineage import of_folder
from pipeline.gguf_folder import dequantize

TEXTS = [f"the {a} {b} sees a {c}" for a in ["red", "blue"] for b in ["cat", "dog"] for c in ["bird", "tree", "house"]]


def regrow(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


@pytest.fixture
def world(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data and `run.yaml`, which is the current folder."""
    monkeypatch.chdir(tmp_path)
    model = folder(initializer_range=0.1)
    (model.path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    text = {"source": f"path:{tmp_path}/text.jsonl", "field": "text"}
    config = {
        "name": "small",
        "model": {"source": f"path:{model.path}", "dtype": "float32"},
        "pruning": {"method": "llm_pruner", "ratio": 0.2, "calibration": {**text, "samples": 2, "length": 8}},
        "recovery": {
            "adapter": {"method": "rora", "rank": 4, "alpha": 4, "rank_pattern": {"up_proj": 6}},
            "tokens": 256, "batch_tokens": 128, "max_length": 64, "learning_rate": 1e-2, "data": [text],
        },
        "evaluation": {"perplexity": [{**text, "name": "text", "window": 16}]},
        "export": ["gguf:f32", "peft", {"format": "quantized", "scheme": "int8"}],
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_a_run_exports_scores_and_caches(world: Path):
    first = regrow("run", "run.yaml", "--json")
    assert first.exit_code == 0, first.output
    results = json.loads(first.stdout)
    assert list(results["models"]) == ["dense", "pruned", "recovered", "recovered-int8"]
    last = results["models"]["recovered-int8"]
    assert last["parameters"] == results["models"]["recovered"]["parameters"]
    assert last["bytes"] < results["models"]["recovered"]["bytes"]
    assert last["perplexity"]["text"] == pytest.approx(results["models"]["recovered"]["perplexity"]["text"], rel=0.1)

    artifacts = world / "runs/small/artifacts"
    said = json.loads((artifacts / "export-gguf-f32/manifest.json").read_text())["report"]
    assert said["check"]["argmax_agreement"] == 1.0
    card = (artifacts / "export-gguf-f32/README.md").read_text()
    for words in (
        "license: apache-2.0",
        "criterion `llm_pruner`",
        "method rora",
        "| perplexity text |",
        "llama-cli -m",
    ):
        assert words in card
    for folder in (artifacts / "export-peft", artifacts / "recover" / "peft"):
        patterns = json.loads((next(folder.rglob("adapter_config.json"))).read_text())["rank_pattern"]
        assert set(patterns.values()) == {6}
    said = json.loads((artifacts / "export-peft/manifest.json").read_text())["report"]
    assert said["check"]["largest_logit_difference"] < 1e-5
    assert "no other model" in (artifacts / "export-peft/README.md").read_text()

    again = json.loads(regrow("export", "run.yaml", "--format", "gguf:f32", "--json").stdout)
    assert {entry["status"] for entry in again["stages"]} == {"cached"}
    assert [entry["export"] for entry in again["stages"] if entry["stage"] == "export"] == ["gguf-f32"]

    # the same model from its folder: the lineage is found in the store
    done = regrow("export", "--model", "runs/small/artifacts/merge/model", "--format", "gguf:q8_0", "-o", "out")
    assert done.exit_code == 0, done.output
    assert "most likely token equal at" in done.stdout
    assert "criterion `llm_pruner`" in (world / "out/README.md").read_text()
    there = regrow("export", "--model", "runs/small/artifacts/merge/model", "--format", "gguf:q8_0", "-o", "out")
    assert there.exit_code == 2
    assert "is there already" in there.stderr


def test_a_gguf_file_is_a_source_like_the_folder_it_was_made_of(world: Path):
    config = yaml.safe_load((world / "run.yaml").read_text())
    folder = config["model"]["source"].removeprefix("path:")
    done = regrow("export", "--model", folder, "--format", "gguf:f32", "-o", "file")
    assert done.exit_code == 0, done.output
    del config["pruning"], config["recovery"], config["export"]
    scores: list[float] = []
    for source in (folder, world / "file/model-f32.gguf"):
        config["model"]["source"] = f"path:{source}"
        (world / "score.yaml").write_text(yaml.safe_dump(config))
        found = regrow("run", "score.yaml", "--json")
        assert found.exit_code == 0, found.output
        scores.append(json.loads(found.stdout)["models"]["dense"]["perplexity"]["text"])
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


def test_a_gguf_file_that_would_be_read_as_another_model_is_refused(folder: Any, tmp_path: Path):
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    (wanted,) = command.asked(("gguf:f32",))
    gguf.write(folder(rope_parameters=scaled), tmp_path, wanted)
    file = tmp_path / "model-f32.gguf"
    with pytest.raises(SourceError, match=r"frequencies are scaled \(rope_freqs.weight\).* name the folder"):
        dequantize(file, tmp_path / "out")
    writer = GGUFWriter(tmp_path / "keys.gguf", "llama")
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(SourceError, match=r"\(llama.rope.scaling.type: linear, llama.rope.scaling.factor: 4.0\)"):
        dequantize(tmp_path / "keys.gguf", tmp_path / "out")
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:300])
    with pytest.raises(SourceError, match="not a whole GGUF file"):
        dequantize(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_pruned_before_is_recovered_without_pruning(world: Path):
    config = yaml.safe_load((world / "run.yaml").read_text())
    config["pruning"] |= {"shape": "free", "protect": {"first": 1, "last": 0}}
    (world / "prune.yaml").write_text(yaml.safe_dump({**config, "name": "first", "export": []}))
    assert regrow("run", "prune.yaml", "--until", "prune").exit_code == 0
    del config["pruning"]
    config |= {"model": {"source": "path:runs/first/artifacts/prune/model", "dtype": "float32"}, "export": ["hf"]}
    (world / "recover.yaml").write_text(yaml.safe_dump(config))
    done = regrow("run", "recover.yaml", "--json")
    assert done.exit_code == 0, done.output
    models = json.loads(done.stdout)["models"]
    assert list(models) == ["dense", "recovered"]
    assert models["recovered"]["parameters"] == models["dense"]["parameters"]
    assert models["recovered"]["perplexity"]["text"] < models["dense"]["perplexity"]["text"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export",), "give either a CONFIG or --model FOLDER"),
        (("export", "--model", "model"), "--format: name at least one"),
        (("export", "--model", "model", "--format", "gguf:q5"), "--format gguf:q5"),
        (("export", "--model", "model", "--format", "onnx"), "--format onnx"),
        (("export", "--model", "nowhere", "--format", "hf"), "not a model folder"),
        (("export", "--model", "model", "--format", "peft"), "there is no adapter to export"),
        (("export", "run.yaml", "--format", "hf:padded"), "hf takes nothing after a colon but pad"),
        (("export", "run.yaml", "--format", "gguf", "--format", "gguf:f16"), "--format: asked for twice: gguf-f16"),
        (("export", "--model", "model", "--format", "hf", "--format", "hf"), "--format: asked for twice: hf"),
        (("export", "--model", "model", "--format", "hf", "--adapter", "x"), "only --format peft writes an adapter"),
        (("export", "--model", "model", "--format", "hf", "--force"), "--force has no effect with --model"),
        (("export", "--model", "model", "--format", "hf", "--set", "seed=1"), "--set has no effect with --model"),
        (("export", "run.yaml", "--adapter", "x"), "--adapter has no effect with a CONFIG"),
        (("export", "run.yaml", "-o", "x"), "--output has no effect with a CONFIG"),
        (("export", "run.yaml", "--set", "export=[]"), "run.yaml: export: nothing is asked for; give --format"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_told_before_any_work(world: Path, words: tuple[str, ...], message: str):
    result = regrow(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (world / "store").exists()


@pytest.mark.parametrize(
    ("form", "entries", "lost", "message"),
    [
        ("hf", {"num_key_value_heads": 3}, None, "num_attention_heads: 8 of layer 0 cannot be divided among"),
        ("hf", {"vocab_size": None}, None, "config.json has no vocab_size"),
        (
            "hf",
            {"intermediate_size": 80},
            None,
            "layers.0.mlp.down_proj.weight is [64, 96], not [64, 80], ",
        ),
        ("hf", {}, "model.norm.weight", "do not fit each other: 1 missing keys: model.norm.weight"),
        ("gguf", {}, "model.norm.weight", "its safetensors files have no model.norm.weight"),
        ("gguf", {"vocab_size": 397}, None, "the tokenizer has a token 399, and the embedding 397 rows"),
        ("gguf", {}, "all", "not a whole safetensors file"),
    ],
    ids=str,
)
def test_a_broken_folder_is_told_in_one_line(
    folder: Any, tmp_path: Path, form: str, entries: dict[str, Any], lost: str | None, message: str
):
    path = folder().path
    said = {**json.loads((path / "config.json").read_text()), **entries}
    (path / "config.json").write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    weights = load_file(path / "model.safetensors")
    save_file({name: value for name, value in weights.items() if name != lost}, path / "model.safetensors")
    if lost == "all":
        (path / "model.safetensors").write_bytes(b"none")
    result = regrow("export", "--model", str(path), "--format", form, "-o", str(tmp_path / "out"))
    assert message in result.stderr
    assert isinstance(result.exception, SystemExit)
    assert {file.name for file in tmp_path.iterdir()} == {"model"}


def test_an_artifact_that_was_copied_out_of_its_store_exports_without_lineage(folder: Any):
    model = folder()
    (model.path / "README.md").write_text("---\nlicense: mit\n---\n")
    manifest = {"stage": "merge", "key": "k" * 64, "material": {"adapter": "a" * 64, "base": "b" * 64}}
    (model.path.parent / "manifest.json").write_text(json.dumps(manifest))
    assert of_folder(model.path) == {"licence": "mit"}


@pytest.mark.parametrize(
    ("form", "remedy"),
    [("gguf", "xllamacpp: pip install 'regrow[export]'"), ("quantized:torchao_int8", "torchao: pip install torchao")],
)
def test_a_missing_package_is_told_before_any_work(
    world: Path, monkeypatch: pytest.MonkeyPatch, form: str, remedy: str
):
    found = importlib.util.find_spec
    absent = ("xllamacpp", "torchao")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name in absent else found(name, *more))
    result = regrow("export", "run.yaml", "--format", form)
    assert result.exit_code == 2
    assert f"needs {remedy}" in result.stderr
    assert not list((world / "store").glob("[!.]*"))  # no stage was built


def test_contradictions_in_the_config_are_named(world: Path):
    config = yaml.safe_load((world / "run.yaml").read_text())
    with pytest.raises(ConfigError, match="export: asked for twice: gguf-f32"):
        check({**config, "export": ["gguf:f32", {"format": "gguf", "type": "f32"}]}, "run.yaml")
    with pytest.raises(ConfigError, match="export: peft writes the adapter"):
        check({**config, "recovery": None}, "run.yaml")

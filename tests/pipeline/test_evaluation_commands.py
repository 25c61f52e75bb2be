"""`evaluate MODEL`, `compare A B`, and items that are scored once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

from evaluation import score as scoring
from pipeline.cli import main
from pruning import checkpoint

ROWS = [{"goal": f"goal {n}", "sol1": "push it", "sol2": "eat it now", "label": n % 2} for n in range(8)]


def regrow(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def evaluated(*words: str) -> dict[str, Any]:
    result = regrow("evaluate", *words, "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.output
    assert "Tokenizing inputs" not in result.stderr  # lm-eval's bars, which TQDM_DISABLE does not reach
    assert "Running loglikelihood" not in result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def folder(tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two models and rows of piqa."""
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tiny_model, tiny_tokenizer, tmp_path / "one")
    torch.manual_seed(5)
    checkpoint.save(LlamaForCausalLM(tiny_model.config), tiny_tokenizer, tmp_path / "two")
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_a_model_is_scored_without_a_config_and_two_are_compared(folder: Path):
    one = evaluated("one", "--suite", "piqa=path:piqa.jsonl")
    two = evaluated("two", "--suite", "piqa=path:piqa.jsonl", "--limit", "6")
    assert one["models"]["dense"]["suites"]["piqa"]["n"] == 8
    assert two["models"]["dense"]["suites"]["piqa"]["n"] == 6
    assert (folder / "runs/evaluate-one/report.md").is_file()
    asked = ("compare", "runs/evaluate-one", "runs/evaluate-two:dense")
    (row,) = json.loads(regrow(*asked, "--json").stdout)["comparisons"]
    assert (row["suite"], row["n"]) == ("piqa", 6)
    assert row["gold_difference"] != 0
    narrow = CliRunner(env={"COLUMNS": "40"}).invoke(main, asked).stdout
    assert all(word in narrow for word in ("no difference seen", "gold log-probability, 95%", "verdict on it"))
    assert "…" not in narrow
    stages = [results["stages"][-1] for results in (one, two)]
    by_key = json.loads(regrow("compare", stages[0]["key"], stages[1]["path"], "--json").stdout)
    assert by_key["comparisons"] == [row]
    assert regrow("compare", "runs/evaluate-one/results.json", "nowhere").exit_code == 2
    wrong = regrow("compare", "runs/evaluate-one:dence", "runs/evaluate-two")
    assert "did you mean 'dense'" in wrong.stderr
    (folder / "store").rename(folder / "moved")
    moved = regrow(*asked)
    assert (moved.exit_code, f"{folder}/store/evaluate/" in moved.stderr) == (2, True)
    assert "is not there; run its config again" in moved.stderr
    (folder / "results.json").write_text('{"name": "x", "models": {"dense": {}}, "stages": [3]}')
    assert "is not a run's results.json" in regrow("compare", "results.json", "results.json").stderr


def test_a_larger_limit_scores_only_the_rest(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    loglikelihood = scoring.SharedPrefixLM.loglikelihood

    def counted(self: Any, requests: Any, **named: Any) -> Any:
        asked.append(len(requests))
        return loglikelihood(self, requests, **named)

    monkeypatch.setattr(scoring.SharedPrefixLM, "loglikelihood", counted)
    words = ("one", "--suite", "piqa=path:piqa.jsonl")
    evaluated(*words, "--limit", "3")
    more = evaluated(*words)
    assert asked == [6, 10]  # two choices an item
    assert evaluated(*words, "--limit", "5")["models"]["dense"]["suites"]["piqa"]["n"] == 5
    assert asked == [6, 10]
    manifest = json.loads(regrow("show", more["stages"][-1]["key"]).stdout)
    assert manifest["reused"]["items"] == 3
    whole = evaluated(*words, "--force")
    assert asked == [6, 10, 16]
    before, after = (results["models"]["dense"]["suites"]["piqa"] for results in (more, whole))
    assert before == pytest.approx(after, abs=1e-5)


def test_any_architecture_is_scored_and_mistakes_are_told(folder: Path, tiny_tokenizer: Any):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    bad = "".join(json.dumps(row) + "\n" for row in (ROWS[0], {**ROWS[1], "sol2": " "}))
    (folder / "bad.jsonl").write_text(bad)
    checkpoint.save(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=264, **size)), tiny_tokenizer, folder / "neox")
    assert evaluated("neox", "--suite", "piqa=path:piqa.jsonl")["models"]["dense"]["suites"]["piqa"]["n"] == 8
    for words, message in (
        (("one",), "nothing to score; give --suite"),
        (("one", "--suite", "piqua=path:piqa.jsonl"), "did you mean 'piqa'"),
        (("nowhere", "--suite", "piqa"), "no such folder or config"),
        (("some.yaml", "--suite", "piqa"), "it says evaluation.suites itself, which --set changes"),
        (("some.yaml", "--no-bos"), "--bos/--no-bos goes with a model; some.yaml is a config"),
        (("some.yaml", "--limit", "5"), "evaluation.limit"),
        (("some.yaml", "--dtype", "float16"), "model.dtype"),
        (("some.yaml", "--device", "cpu"), "runtime.device"),
        (("one", "--suite", "piqa=path:bad.jsonl"), "path:bad.jsonl: row 2: field 'sol2' has an empty choice"),
    ):
        result = regrow("evaluate", *words)
        assert result.exit_code == 2
        assert message in result.stderr


def test_speed_and_texts_side_by_side(folder: Path):
    words = ("--dtype", "float32", "--json", "--new", "3")
    found = json.loads(regrow("speed", "one", "two", "--prompt", "8", "--repeats", "1", *words).stdout)
    assert list(found["models"]) == ["one", "two"]
    assert found["models"]["one"]["macs"] == found["models"]["two"]["macs"] > 0
    assert "decode tokens/s" in regrow("speed", "one", "--prompt", "8", "--repeats", "1", "--new", "3").stdout
    assert "do not fit into its window" in regrow("speed", "one", "--prompt", "300").stderr
    wrong = regrow("speed", "one", "--device", "gpu")
    assert (wrong.exit_code, "--device gpu: String should match pattern" in wrong.stderr) == (2, True)
    found = json.loads(regrow("sample", "one", "two", "--prompt", "the cat", *words).stdout)
    assert found["prompts"] == ["the cat"]
    assert all(len(model["texts"]) == 1 for model in found["models"].values())
    assert found["models"]["one"]["truncated"] == [False]
    assert "[one: longer than its window" in regrow("sample", "one", "--prompt", "a " * 200, "--new", "3").stdout
    wrong = regrow("sample", "one", "--prompt", "caf\udce9")
    assert (wrong.exit_code, "--prompt 'caf\\udce9': not UTF-8 text" in wrong.stderr) == (2, True)
    assert regrow("speed", "one", "--threads", "1025").exit_code == 2
    weights = folder / "two" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    for command in ("sample", "speed"):
        broken = regrow(command, "two")
        assert (broken.exit_code, "two: its weights cannot be read" in broken.stderr) == (2, True), broken.output
    for file, message in (("tokenizer*", "one has no tokenizer"), ("*.safetensors", "one has no .safetensors weights")):
        for path in (folder / "one").glob(file):
            path.unlink()
        lacking = regrow("sample", "one")
        assert (lacking.exit_code, message in lacking.stderr) == (2, True), lacking.output


def test_protocols_never_share_a_table(folder: Path):
    rows = "path:piqa.jsonl"
    results = evaluated("one", "--suite", f"piqa={rows}", "--suite", f"piqa_generated={rows}", "--limit", "2")
    dense = results["models"]["dense"]
    assert dense["averages"]["A"]["average"] == dense["suites"]["piqa"]["acc"] == dense["average"]
    assert dense["averages"]["B"]["average"] == dense["suites"]["piqa_generated"]["acc"]
    first, second = (folder / "runs/evaluate-one/report.md").read_text().split("## Protocol B")
    assert "| piqa (acc)" in first
    assert "piqa_generated" not in first
    assert "| piqa_generated (acc)" in second
    assert "| answers that name no option | " in second

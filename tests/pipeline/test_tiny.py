"""The regression gate: `configs/tiny.yaml` on three worlds, dense well above chance, pruned worse, recovered back."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.config import shipped_folder

CHANCE = 0.25


def regrow(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_three_steps_are_seen_in_every_world(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = (shipped_folder() / "tiny.yaml").read_text(encoding="utf-8")
    Path("tiny.yaml").write_text(text.replace("synthetic:0", f"synthetic:{seed}"), encoding="utf-8")
    results = regrow("run", "tiny.yaml", "--set", f"seed={seed}")
    dense, pruned, recovered = results["models"].values()
    assert dense["average"] > CHANCE + 0.4
    assert pruned["average"] < dense["average"] - 0.15
    assert recovered["average"] > pruned["average"] + 0.1
    assert pruned["perplexity"]["heldout"] > recovered["perplexity"]["heldout"] > 1
    assert dense["gold_logprob"] > pruned["gold_logprob"] < recovered["gold_logprob"]

    again = regrow("run", "tiny.yaml", "--set", f"seed={seed}")
    assert {entry["status"] for entry in again["stages"]} == {"cached"}
    assert again["models"] == results["models"]
    collected = CliRunner().invoke(main, ["gc", "--dry-run"]).output
    assert collected == "0 folders, 0.0 MB\n"  # a cached run opens no source, and keeps its world

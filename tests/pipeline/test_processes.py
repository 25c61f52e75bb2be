"""Two processes train what one does: their losses agree, with whole and with sharded weights."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from pipeline import config_file, preflight, processes
from pipeline.cli import main
from pipeline.errors import ConfigError
from pipeline.sources import Sources
from pipeline.store import Store
from pruning import checkpoint

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/accelerate/fsdp2-13b.yaml"
LAUNCH = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--config_file", str(CONFIG), "--num_processes", "2"],
}


@pytest.fixture
def config(tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any) -> Path:
    tiny_model.lm_head.weight.data.mul_(20)  # surer of what it says, so that distillation has something to teach
    checkpoint.save(tiny_model, tiny_tokenizer, tmp_path / "dense")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the number {n} follows {n - 1}"}) + "\n" for n in range(60)))
    said = {
        "name": "small",
        "model": {"source": f"path:{tmp_path}/dense", "dtype": "float32"},
        "pruning": {"method": "random", "ratio": 0.1, "structures": ["ffn"]},
        "recovery": {
            "adapter": {"method": "dora", "rank": 4, "alpha": 4, "dropout": 0.1},
            "tokens": 1500,
            "batch_tokens": 330,  # five rows a step: the second process has one less
            "max_length": 64,
            "learning_rate": 3e-3,
            "validation": {"fraction": 0.1, "tokens": 150},
            "data": [{"source": f"path:{text}", "field": "text"}],
        },
        "evaluation": {"perplexity": [{"name": "text", "source": f"path:{text}", "field": "text"}]},
        "runtime": {"threads": 1, "device": "cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(said))
    return tmp_path / "run.yaml"


def words(config: Path, store: str, override: str) -> list[str]:
    places = ["--store", str(config.parent / store), "--runs", str(config.parent / store / "runs")]
    return ["run", str(config), "--until", "merge", *places, "--json", "--set", override]


def trained(config: Path, store: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    (folder,) = (config.parent / store / "recover").iterdir()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return log, load_file(folder / "adapter" / "adapter.safetensors")


@pytest.mark.parametrize(
    ("launcher", "override"),
    [
        ("torchrun", "recovery.adapter={method: randlora, rank: 4}"),  # fused: gradients are collected over passes
        ("accelerate", "recovery.distillation={positions: all, top_k: 16}"),
    ],
)
def test_two_processes_train_what_one_does(launcher: str, override: str, config: Path) -> None:
    alone = CliRunner().invoke(main, words(config, "one", override))
    assert alone.exit_code == 0, alone.output
    command = [sys.executable, "-m", *LAUNCH[launcher], "-m", "pipeline.cli", *words(config, "two", override)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if launcher == "accelerate":
        with socket.socket() as free:
            free.bind(("localhost", 0))
            command[5:5] = ["--main_process_port", str(free.getsockname()[1])]
    together = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert together.returncode == 0, together.stderr
    first, second = (json.loads(output) for output in (alone.stdout, together.stdout))  # one process speaks
    assert [entry["key"] for entry in first["stages"]] == [entry["key"] for entry in second["stages"]]
    (log, adapter), (other_log, other) = trained(config, "one"), trained(config, "two")
    assert len(log) == len(other_log) > 4
    for mine, theirs in zip(log, other_log, strict=True):
        assert theirs["step"] == mine["step"]
        for name in mine.keys() - {"seconds"}:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5), name
    assert sum("validation_loss" in line for line in log) >= 3
    (folder,) = (config.parent / "two" / "recover").iterdir()
    report = json.loads((folder / "manifest.json").read_text())["report"]
    assert (report["processes"], report["sharded"]) == (2, launcher == "accelerate")
    for name, tensor in adapter.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(ConfigError, match=r"2 processes on this machine, where torch sees 1 GPU\(s\): start no more"),
        processes.joined(),
    ):
        pass


def test_a_step_of_fewer_rows_than_processes_is_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, sources = config_file.load(config), Sources(Store(config.parent / "store"), {})
    monkeypatch.setattr(processes, "count", lambda: 5)
    preflight.check_length(said, sources)
    monkeypatch.setattr(processes, "count", lambda: 6)
    with pytest.raises(ConfigError, match=r"batch_tokens: .* 330 tokens holds 5 .* 6 processes: set it to 384 or more"):
        preflight.check_length(said, sources)

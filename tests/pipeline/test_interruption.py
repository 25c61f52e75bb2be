"""A run that is stopped in the middle of training goes on, and ends with the same adapter, bit for bit."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaForCausalLM

from pruning import checkpoint
from recovery import checkpoints, history

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any) -> Path:
    checkpoint.save(tiny_model, tiny_tokenizer, tmp_path / "dense")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the number {n} follows {n - 1}"}) + "\n" for n in range(60)))
    said = {
        "name": "small",
        "model": {"source": f"path:{tmp_path}/dense", "dtype": "float32"},
        "recovery": {
            "adapter": {"method": "rora", "rank": 4, "alpha": 4, "dropout": 0.1},
            "tokens": 8000,
            "batch_tokens": 128,
            "max_length": 64,
            "checkpoint_every": 0,
            "data": [{"source": f"path:{text}", "field": "text"}],
        },
        "evaluation": {"perplexity": [{"name": "text", "source": f"path:{text}", "field": "text"}]},
        "runtime": {"threads": 1, "device": "cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(said))
    return tmp_path / "run.yaml"


def start(config: Path, store: str, *more: str) -> "subprocess.Popen[bytes]":
    folder = config.parent
    words = ["run", str(config), "--until", "recover", "--store", str(folder / store), "--runs", str(folder / "runs")]
    words += more
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # which a shell may have us ignore
    )


def finish(process: "subprocess.Popen[bytes]") -> None:
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()


def adapter(config: Path, store: str) -> bytes:
    (folder,) = (config.parent / store / "recover").iterdir()
    return (folder / "adapter" / "adapter.safetensors").read_bytes()


def test_ctrl_c_keeps_the_last_step(config: Path) -> None:
    """Even of a build anew, and where no checkpoint is ever due."""
    words = ("--set", "recovery.checkpoint_every=.inf", "--set", "recovery.tokens=6000", "--force", "recover")
    stopped = start(config, "store", *words)
    work = config.parent / "store" / ".work"
    deadline = time.monotonic() + 200
    while sum(file.read_bytes().count(b"\n") for file in work.glob(f"recover-*/scratch/{history.LOG}")) < 3:
        assert time.monotonic() < deadline
        assert stopped.poll() is None, stopped.communicate()[1].decode()
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    said = stopped.communicate(timeout=60)[1].decode()
    assert stopped.returncode == 130
    assert "the same command goes on where it stopped" in said
    assert "Traceback" not in said
    (log,) = work.glob(f"recover-*/scratch/{history.LOG}")
    steps = len(log.read_text().splitlines())
    assert checkpoints.state_of(log.parent / checkpoints.LAST)["step"] == steps >= 3
    finish(start(config, "store", *words))
    results = json.loads((config.parent / "runs/small/results.json").read_text())
    assert [entry["status"] for entry in results["stages"]] == ["resumed"]
    (log,) = (config.parent / "store").glob(f"recover/*/{history.LOG}")
    logged = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert logged == list(range(1, len(logged) + 1))
    assert len(logged) > steps


def test_a_killed_run_ends_with_the_same_adapter(config: Path) -> None:
    killed = start(config, "killed")
    work = config.parent / "killed" / ".work"
    deadline = time.monotonic() + 200
    while not (found := list(work.glob(f"recover-*/scratch/{checkpoints.LAST}"))):
        assert time.monotonic() < deadline
        assert killed.poll() is None, killed.communicate()[1].decode()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    stopped = checkpoints.state_of(found[0])
    assert stopped["step"] >= 1
    assert stopped["tokens"] < 6000  # in the middle
    assert not (config.parent / "killed" / "recover").exists()
    finish(start(config, "killed"))
    finish(start(config, "straight"))
    assert adapter(config, "killed") == adapter(config, "straight")
    results = json.loads((config.parent / "runs/small/results.json").read_text())
    assert [entry["stage"] for entry in results["stages"]] == ["recover"]

"""The command, end to end, on a tiny random model: statuses, caching, output, errors."""

import json
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline.cli import main
from pipeline.plan import label_of
from pipeline.results import read_results
from pipeline.run import link
from pruning import checkpoint

TEXTS = [f"the {a} {b} sees a {c} near the {d}" for a in ["red", "blue"] for b in ["cat", "dog"]
         for c in ["bird", "tree", "house"] for d in ["river", "road"]]  # fmt: skip


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"path:{path}"


@pytest.fixture
def world(tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data and `run.yaml`, which is the current folder."""
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tiny_model, tiny_tokenizer, tmp_path / "dense")
    text = lines(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])
    rows = [{"goal": f"goal {n}", "sol1": "push it", "sol2": "eat it", "label": n % 2} for n in range(12)]
    config = {
        "name": "small",
        "model": {"source": f"path:{tmp_path}/dense", "dtype": "float32"},
        "pruning": {
            "method": "llm_pruner",
            "ratio": 0.1,
            "calibration": {"source": text, "field": "text", "samples": 4, "length": 12},
        },
        "recovery": {
            "adapter": {"method": "rora", "rank": 4, "alpha": 4},
            "tokens": 512,
            "batch_tokens": 128,
            "max_length": 64,
            "data": [{"source": text, "field": "text"}],
        },
        "evaluation": {
            "suites": [{"name": "piqa", "source": lines(tmp_path / "piqa.jsonl", rows)}],
            "perplexity": [{"name": "text", "source": text, "field": "text", "window": 32}],
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def regrow(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def run(*words: str) -> dict[str, Any]:
    result = regrow("run", "run.yaml", "--json", *words)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def losses(recover: dict[str, Any]) -> list[float]:
    """The training loss of every step."""
    log = (Path(recover["path"]) / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["loss"] for line in log.splitlines()]


def statuses(results: dict[str, Any]) -> dict[str, str]:
    return {label_of(entry): entry["status"] for entry in results["stages"]}


def test_a_run_builds_every_stage_and_its_results_follow_the_contract(world: Path):
    results = run()
    assert set(statuses(results).values()) == {"built"}
    assert list(results["models"]) == ["dense", "pruned", "recovered"]
    dense, pruned, recovered = results["models"].values()
    assert results["schema"] == 1
    assert pruned["parameters"] == recovered["parameters"] < dense["parameters"]
    for model in results["models"].values():
        piqa = model["suites"]["piqa"]
        assert {"protocol", "n", "acc", "acc_stderr", "acc_norm", "gold_logprob"} <= piqa.keys()
        assert (piqa["protocol"], piqa["n"]) == ("A", 12)
        assert model["average"] == piqa["acc"]
        assert model["perplexity"]["text"] > 1
    for entry in results["stages"]:
        assert entry["seconds"] >= 0
        assert entry["peak_memory_bytes"] > 0
        assert Path(entry["path"]).is_dir()

    assert json.loads((world / "runs/small/results.json").read_text()) == results
    report = (world / "runs/small/report.md").read_text()
    assert "| parameters |" in report
    assert "| piqa (acc) |" in report
    artifacts = world / "runs/small/artifacts"
    assert (artifacts / "prune/structures.json").is_file()
    assert (artifacts / "merge/model/model.safetensors").is_file()
    assert len((artifacts / "evaluate-pruned-piqa/items.jsonl").read_text().splitlines()) == 12
    manifest = json.loads((artifacts / "merge/manifest.json").read_text())
    assert manifest["report"]["largest_logit_difference"] < 1e-4
    assert manifest["provenance"]["versions"]["torch"]


def test_a_second_run_is_all_cached_and_never_imports_torch(world: Path):
    first = run()
    code = (
        "import sys, time; start = time.monotonic()\n"
        "from pipeline.cli import main\n"
        "main(['run', 'run.yaml', '--json'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    root = str(Path(__file__).parents[2])
    again = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}"],
                           capture_output=True, text=True)  # fmt: skip
    assert again.returncode == 0, again.stderr
    second = json.loads(again.stdout)
    assert set(statuses(second).values()) == {"cached"}
    assert second["models"] == first["models"]
    help_text = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\nfrom pipeline.cli import main\n"
         "try: main(['--help'])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert help_text.returncode == 0
    assert "Usage" in help_text.stdout


def test_another_rank_keeps_the_pruned_model_and_the_dense_and_pruned_scores(world: Path):
    run()
    plan = json.loads(regrow("plan", "run.yaml", "--json", "--set", "recovery.adapter.rank=2").stdout)
    weights = json.loads((world / "runs/small/results.json").read_text())["models"]["dense"]["bytes"]
    assert weights < plan["pruning_memory_bytes"] < 100 * weights  # of a tiny model, most is not weights
    whys = {(step["stage"], step["model"]): step["why"] for step in plan["steps"] if step["status"] == "build"}
    assert whys["recover", "pruned"] == "config.adapter.rank: 4 -> 2"
    assert whys["merge", "pruned"] == "the adapter changed"
    found = statuses(run("--set", "recovery.adapter.rank=2"))
    built = {label for label, status in found.items() if status == "built"}
    assert built == {"recover", "merge", "evaluate recovered piqa", "evaluate recovered text"}


def test_recoveries_share_one_teacher(world: Path):
    taught = ["--until", "recover", "--set", "recovery.distillation={top_k: 8}"]
    assert statuses(run(*taught))["teacher"] == "built"
    for other in ("adapter.rank=2", "learning_rate=1e-3", "distillation.weight=0.9", "distillation.temperature=2"):
        found = statuses(run(*taught, "--set", f"recovery.{other}"))
        assert (found["teacher"], found["recover"]) == ("cached", "built"), other
    assert statuses(run(*taught, "--set", "pruning.ratio=0.2"))["teacher"] == "cached"
    plan = json.loads(regrow("plan", "run.yaml", "--json", *taught[2:], "--set", "recovery.seed=5").stdout)
    whys = {step["stage"]: step["why"] for step in plan["steps"] if step["status"] == "build"}
    assert whys["teacher"] == "rows.seed: 0 -> 5"
    assert "the teacher changed" in whys["recover"]
    # On the fly there is no such stage, and the adapter is the same, so it has the same key.
    on_the_fly = statuses(run(*taught, "--set", "recovery.distillation.cache=false"))
    assert "teacher" not in on_the_fly
    assert on_the_fly["recover"] == "cached"
    matched = [*taught, "--set", "recovery.distillation={cache: false, hidden: 0.5, positions: all}"]
    assert statuses(run(*matched))["recover"] == "built"


def test_another_model_teaches_and_is_known_by_its_content(world: Path, tiny_model: Any, tiny_tokenizer: Any):
    tiny_model.lm_head.weight.data.mul_(2)
    checkpoint.save(tiny_model, tiny_tokenizer, world / "other")
    taught = ["--until", "recover", "--set", "recovery.distillation={top_k: 8, positions: all}"]
    built = {stage["stage"]: stage for stage in run(*taught)["stages"]}

    def under(folder: str) -> list[str]:
        return [*taught, "--set", f"recovery.distillation.teacher=path:{world / folder}"]

    other = {stage["stage"]: stage for stage in run(*under("other"))["stages"]}
    assert [other[stage]["status"] for stage in ("prune", "teacher", "recover")] == ["cached", "built", "built"]
    first, second = (Path(found["teacher"]["path"]) / "00000.safetensors" for found in (built, other))
    assert not load_file(first)["logprobs"].equal(load_file(second)["logprobs"])
    (world / "other").rename(world / "moved")
    assert statuses(run(*under("moved")))["recover"] == "cached"
    assert statuses(run(*under("dense")))["teacher"] == "cached"  # as when none is named
    on_the_fly = [*under("moved"), "--set", "recovery.distillation.cache=false"]
    assert statuses(run(*on_the_fly))["recover"] == "cached"
    kept = losses(other["recover"])
    assert kept != losses(built["recover"])
    (live,) = (stage for stage in run(*on_the_fly, "--force", "recover")["stages"] if stage["stage"] == "recover")
    assert (live["status"], losses(live)) == ("built", kept)


def test_a_teacher_of_other_words_or_kind_is_refused_before_any_work(world: Path, tiny_model: Any, tiny_tokenizer: Any):
    def refused(folder: str) -> str:
        taught = f"recovery.distillation.teacher=path:{world / folder}"
        result = regrow("run", "run.yaml", "--set", taught)
        assert (result.exit_code, list((world / "store").glob("[!.]*"))) == (2, [])
        return result.stderr

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=260)).save_pretrained(world / "gpt2")
    assert "recovery.distillation.teacher: path:" in (said := refused("gpt2"))
    assert "is GPT2LMHeadModel; regrow serves LlamaForCausalLM" in said
    wider = LlamaForCausalLM(LlamaConfig.from_dict({**tiny_model.config.to_dict(), "vocab_size": 999}))
    checkpoint.save(wider, tiny_tokenizer, world / "wider")
    assert f"vocab_size is {tiny_model.config.vocab_size}, the teacher's is 999" in refused("wider")
    shorter = LlamaForCausalLM(LlamaConfig.from_dict({**tiny_model.config.to_dict(), "max_position_embeddings": 32}))
    checkpoint.save(shorter, tiny_tokenizer, world / "shorter")
    assert "recovery.max_length: 64 is more than the 32 positions of path:" in refused("shorter")
    checkpoint.save(tiny_model, tiny_tokenizer, world / "renamed")
    tokenizer = world / "renamed" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8").replace('"a":', '"the a":'), encoding="utf-8")
    assert "has another tokenizer than path:" in refused("renamed")
    assert "no such file or folder" in refused("nowhere")
    assert "did you mean 'teacher'?" in regrow("plan", "run.yaml", "--set", "recovery.distillation.techer=x").stderr


def test_other_ratios_and_criteria_share_their_statistics(world: Path):
    run("--until", "prune")
    found = statuses(run("--until", "prune", "--set", "pruning.ratio=0.15", "--set", "pruning.taylor=vectorize"))
    assert found == {"statistics gradients": "cached", "prune": "built"}
    found = statuses(run("--until", "prune", "--set", "pruning.method=wanda", "--set", "pruning.compensation=bias"))
    assert found == {"statistics activations": "built", "prune": "built"}
    found = statuses(run("--until", "prune", "--set", "pruning.method=flap", "--set", "pruning.structures=[ffn]"))
    assert found == {"statistics activations": "cached", "prune": "built"}
    result = regrow("prune", "run.yaml", "--set", "pruning.calibration.length=256")
    assert result.exit_code == 1
    assert "windows of 256 tokens" in result.output


def test_what_the_models_config_shows_to_be_impossible_stops_before_any_work(world: Path):
    result = regrow("prune", "run.yaml", "--set", "pruning.ratio=0.97")
    assert result.exit_code == 2
    assert "pruning.ratio: 0.97 cannot be reached" in result.output
    assert not (world / "store" / "statistics").exists()


def test_until_and_force(world: Path):
    assert set(statuses(run("--until", "recover"))) == {"statistics gradients", "prune", "recover"}
    assert set(statuses(json.loads(regrow("prune", "run.yaml", "--json").stdout)).values()) == {"cached"}
    run()
    forced = {label for label, status in statuses(run("--force", "merge")).items() if status == "built"}
    assert forced == {"merge", "evaluate recovered piqa", "evaluate recovered text"}
    shown = (world / "runs/small/results.json").read_text()
    for words in (
        ("run", "--force", "export"),
        ("run", "--until", "prune", "--force", "recover"),
        ("run", "--until", "teacher"),
        ("recover", "--set", "recovery=null"),
    ):
        nothing = regrow(words[0], "run.yaml", *words[1:])
        assert (nothing.exit_code, "no such stage in this run, which has statistics" in nothing.stderr) == (2, True)
    assert (world / "runs/small/results.json").read_text() == shown


def test_show_verify_report_and_gc(world: Path):
    results = run()
    key = next(entry["key"] for entry in results["stages"] if entry["stage"] == "prune")
    assert json.loads(regrow("show", key).stdout)["material"]["config"]["ratio"] == 0.1
    assert "0 damaged" in regrow("verify").stdout
    assert regrow("report", "run.yaml", "--format", "json").exit_code == 0
    assert "| piqa (acc) |" in regrow("report", "run.yaml").stdout

    model = next((world / "store/prune").glob("*/model/config.json"))
    model.write_text(model.read_text() + " ")
    damaged = regrow("verify", key)
    assert damaged.exit_code == 1
    assert "model/config.json: changed since it was built" in damaged.stdout

    run("--set", "recovery.adapter.rank=2")  # the run folder now shows rank 2; rank 4's adapter is free to go
    would = regrow("gc", "--dry-run").stdout
    assert "would remove" in would
    gone = [line for line in regrow("gc").stdout.splitlines() if line.startswith("removed")]
    assert len(gone) == 4
    assert set(statuses(run("--set", "recovery.adapter.rank=2")).values()) == {"cached"}


@pytest.mark.parametrize("command", ["verify", "gc"])
def test_a_store_that_is_not_there_is_not_taken_for_an_empty_one(tmp_path: Path, command: str):
    result = regrow(command, "--store", str(tmp_path / "nowhere"))
    assert (result.exit_code, result.stdout, "nowhere: no such folder" in result.stderr) == (2, "", True)


def test_two_runs_that_end_together_leave_every_link(tmp_path: Path):
    targets = {f"evaluate-{n}": tmp_path / f"{n}" for n in range(10)}
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "stale").symlink_to(tmp_path)

    def often() -> None:
        for _ in range(100):
            link(tmp_path / "links", targets)

    together = [get_context("fork").Process(target=often) for _ in range(2)]
    for process in together:
        process.start()
    for process in together:
        process.join()
    assert [process.exitcode for process in together] == [0, 0]
    assert {path.name: path.resolve() for path in (tmp_path / "links").iterdir()} == targets


def test_what_the_system_refuses_is_one_line(world: Path):
    (world / "file").touch()
    for words in (("--store", "file"), ("--runs", "file")):
        result = regrow("plan" if "--runs" in words else "run", "run.yaml", *words)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1), result.output
        assert "file" in result.stderr
        assert "Not a directory" in result.stderr


@pytest.mark.parametrize("said", ["", "[1]", '{"stages": 1}', '{"stages": [{}]}', '{"stages": [1]}'])
def test_results_that_are_something_else_are_none(tmp_path: Path, said: str):
    (tmp_path / "results.json").write_text(said)
    assert read_results(tmp_path) == {}


def test_methods_are_listed_with_a_line_each():
    found = json.loads(regrow("methods", "--json").stdout)
    assert {"llm_pruner", "random"} <= set(found["criteria"])
    assert {"lora", "rora", "dora", "randlora"} <= set(found["adapters"])
    assert "piqa" in found["suites"]
    assert all(line for kind in found.values() for line in kind.values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pruning.ratio=1.2", "pruning.ratio: Input should be less than 1"),
        ("model.source=path:nowhere", "no such file or folder"),
        ("evaluation.suites.0.source=path:nowhere.jsonl", "no such file or folder"),
        ("evaluation.suites.0.name=piqua", "did you mean 'piqa'"),
        ("recovery.data.0.field=txt", "has no text field 'txt'"),
        ("runtime.device=cuda", "runtime.device: cuda: torch"),
        ("runtime.device=mps", "runtime.device: mps: torch"),
        ("runtime.placement=spread", "runtime.placement: spread: torch"),
        ("runtime.threads=1025", "runtime.threads: Input should be less than or equal to 1024"),
        ("pruning.calibration.length=200", "holds 0 windows of 200 tokens, 4 are asked for"),
        ("pruning.calibration.length=500", "pruning.calibration.length: 500 is more than the 256 positions of path:"),
        ("evaluation.perplexity.0.tokens=31", "tokens: 31 make no window of 32"),
        ("evaluation.perplexity.0.window=257", "text: window: 257 is more than the 256 positions of path:"),
        ("evaluation.perplexity.0.window=256 & evaluation.perplexity.0.limit=1", "tokens make no window of 256"),
        ("recovery.adapter.targets=[qproj]", "no linear layer is called 'qproj'"),
        ("recovery.adapter.rank_pattern={mlp: 3}", "no adapted layer's name ends in 'mlp'"),
        (
            "recovery.max_length=400 & recovery.batch_tokens=400",
            "recovery.max_length: 400 is more than the 256 positions of path:",
        ),
        ("recovery.validation={patience: 1} & recovery.data.0.limit=9", "patience: no source has the ten examples"),
        ("recovery.validation={fraction: 0, patience: 1}", "patience: with fraction 0 nothing is held out"),
        (
            "recovery.distillation={hidden: 1, cache: false} & pruning.structures=[hidden]",
            "a model with hidden pruned has other hidden states",
        ),
        ("recovery.clip=.inf", "recovery.clip: Input should be a finite number (got inf)"),
    ],
)
def test_bad_input_is_told_before_any_work_and_leaves_nothing(
    world: Path, override: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # a machine with a GPU passes this test, too
    result = regrow("run", "run.yaml", *(word for part in override.split(" & ") for word in ("--set", part)))
    assert message in result.stderr
    assert "Traceback" not in result.output
    late = "windows of" in message  # only the tokenizer can tell
    assert result.exit_code == (1 if late else 2)
    if not late:
        assert not list((world / "store").glob("[!.]*"))
        assert not (world / "runs").exists()
    assert not list((world / "store" / ".work").glob("*"))


def test_a_model_that_is_not_llama_like_is_refused_before_any_work(world: Path, tiny_tokenizer: Any):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=260)).save_pretrained(world / "gpt2")
    tiny_tokenizer.save_pretrained(world / "gpt2")
    result = regrow("run", "run.yaml", "--set", f"model.source=path:{world}/gpt2")
    assert result.exit_code == 2
    assert "is GPT2LMHeadModel; regrow serves LlamaForCausalLM" in result.stderr
    assert not list((world / "store").glob("[!.]*"))


def test_a_tokenizer_that_ends_every_text_is_refused_before_any_work(world: Path):
    file = world / "dense" / "tokenizer.json"
    said = json.loads(file.read_text())
    said["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    said["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    file.write_text(json.dumps(said))
    result = regrow("run", "run.yaml")
    assert result.exit_code == 2
    assert "ends every text by </s>; set add_eos_token to false" in result.stderr
    assert not list((world / "store").glob("[!.]*"))


def test_a_model_without_a_tokenizer_is_told_before_any_work(world: Path):
    for file in (world / "dense").glob("tokenizer*"):
        file.unlink()
    for words in (("run",), ("run", "--until", "prune")):
        result = regrow(*words, "run.yaml")
        assert result.exit_code == 2
        assert f"{world}/dense has no tokenizer; copy its files into it" in result.stderr
    (world / "dense" / "tokenizer.json").write_text("{")
    assert "has no tokenizer that can be read" in regrow("run", "run.yaml").stderr
    assert not list((world / "store").glob("[!.]*"))


@pytest.mark.parametrize(
    ("command", "name", "value", "message"),
    [
        ("run", "num_key_value_heads", 3, "num_attention_heads: 4 of layer 0 cannot"),
        ("plan", "num_key_value_heads", 3, "num_attention_heads: 4 of layer 0 cannot"),
        ("run", "max_position_embeddings", None, "max_position_embeddings: None is no whole number"),
        ("run --set pruning=null", "hidden_size", None, "hidden_size: None is no whole number"),
        ("plan", "num_hidden_layers", "2", "num_hidden_layers: '2' is no whole number"),
    ],
)
def test_a_shape_that_cannot_be_is_told_of_the_model(
    world: Path, tiny_model: Any, command: str, name: str, value: object, message: str
):
    tiny_model.save_pretrained(world / "odd")
    said = json.loads((world / "odd" / "config.json").read_text())
    (world / "odd" / "config.json").write_text(json.dumps({**said, name: value}))
    result = regrow(*command.split(), "run.yaml", "--set", f"model.source=path:{world}/odd")
    assert result.exit_code == 2
    assert f"model.source: path:{world}/odd: config.json: {message}" in result.stderr


def test_weights_that_would_have_to_be_unpickled_are_refused(world: Path):
    (world / "dense" / "model.safetensors").rename(world / "dense" / "pytorch_model.bin")
    result = regrow("run", "run.yaml")
    assert result.exit_code == 2
    assert "has no .safetensors weights; regrow unpickles nothing" in result.stderr


def test_training_on_a_scored_question_is_refused(world: Path):
    data = f"[{{source: 'path:{world}/piqa.jsonl', suite: piqa}}]"
    result = regrow("run", "run.yaml", "--set", f"recovery.data={data}")
    assert result.exit_code == 2
    assert "12 questions or texts of piqa are also scored" in result.stderr
    halved = regrow(
        "run", "run.yaml", "--until", "recover", "--set", f"recovery.data={data[:-2]}, half: recovery}}]",
        "--set", "evaluation.suites.0.half=scored", "--set", "recovery.tokens=256",
    )  # fmt: skip
    assert halved.exit_code == 0, halved.output


def test_a_failed_stage_exits_with_1_and_its_finished_neighbours_stay(world: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(model: Any, tokenizer: Any, sources: Any, config: Any, scratch: Path, *others: Any) -> None:
        (scratch / "log.jsonl").write_text("{}\n")
        raise RuntimeError("the loss is nan at step 3")

    import pipeline.recovering

    run("--until", "prune")
    monkeypatch.setattr(pipeline.recovering, "train", fail)
    result = regrow("run", "run.yaml")
    assert result.exit_code == 1
    assert "recover failed: the loss is nan at step 3" in result.stderr
    assert "Traceback" not in result.output
    assert regrow("gc").stdout == "0 folders, 0.0 MB\n"  # neither what it found cached nor its scratch
    monkeypatch.undo()
    monkeypatch.chdir(world)
    found = statuses(run())
    assert (found["prune"], found["recover"]) == ("cached", "built")  # there was no checkpoint to go on from


def test_dense_models_can_be_recovered_without_pruning(world: Path):
    config = yaml.safe_load((world / "run.yaml").read_text())
    del config["pruning"]
    (world / "run.yaml").write_text(yaml.safe_dump(config))
    results = run()
    assert list(results["models"]) == ["dense", "recovered"]
    assert "prune" not in statuses(results)

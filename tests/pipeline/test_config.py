import itertools
import shlex
from pathlib import Path
from typing import Any

import pytest

from pipeline import config_file
from pipeline.config import shipped_folder
from pipeline.errors import ConfigError, SourceError
from pipeline.plan import plan
from pipeline.sources import Sources
from pipeline.steps import Step, steps_of
from pipeline.store import Store
from pruning import criteria

SHIPPED = sorted(shipped_folder().glob("*.yaml"))


def steps(path: Path, *overrides: str, store: Path) -> list[Step]:
    config = config_file.load(path, overrides)
    return steps_of(config, Sources(Store(store), config.checksums))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_config_is_valid_and_plans(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, str, str]] = []
    monkeypatch.setattr("pipeline.hub.commit", lambda spec, *what: asked.append(what) or "0" * 40)
    config = config_file.load(path)
    assert config.name == path.stem
    text = path.read_text(encoding="utf-8")
    assert all(f"# {word}" in text for word in ("For: ", "Needs: ", "Command: ", "Override: "))
    advised = shlex.split(next(line for line in text.splitlines() if line.startswith("# Override: regrow run")))
    overrides = [value for flag, value in itertools.pairwise(advised) if flag == "--set"]
    assert config_file.load(path, overrides) != config
    found = steps(path, store=tmp_path)
    assert len(asked) == len(set(asked))
    labels = [step.label for step in found]
    scored = len(config.evaluation.suites) + len(config.evaluation.perplexity)
    measured = [f"statistics {part.name}" for part in criteria.statistics(config.pruning)] if config.pruning else []
    expected = [*measured, *(["prune"] if config.pruning else []), "recover", "merge"]
    assert labels[: len(expected)] == expected
    assert len(found) == len(expected) + scored * (3 if config.pruning else 2)
    planned = plan(found, Store(tmp_path), tmp_path / "runs")
    assert {(item.status, item.why) for item in planned} == {("build", "not built yet")}
    assert not (tmp_path / "store").exists()


def test_the_papers_recipes_are_all_shipped():
    names = {path.stem for path in SHIPPED}
    models = ("llama-7b", "llama3-8b", "sheared-llama-1.3b")
    assert {f"{model}-{method}" for model in models for method in ("rora", "randlora")} <= names
    assert {"tiny", "smollm2-135m", "smollm2-135m-offline"} <= names


def keys(path: Path, *overrides: str, store: Path) -> dict[str, str]:
    return {step.label: step.key for step in steps(path, *overrides, store=store)}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("recovery.adapter.rank=8", {"recover", "merge", "evaluate recovered"}),
        ("recovery.tokens=50_000", {"recover", "merge", "evaluate recovered"}),
        ("pruning.ratio=0.3", {"prune", "recover", "merge", "evaluate pruned", "evaluate recovered"}),
        ("pruning.taylor=vectorize", {"prune", "recover", "merge", "evaluate pruned", "evaluate recovered"}),
        ("model.dtype=bfloat16", {"statistics", "prune", "recover", "merge", "evaluate"}),
        ("evaluation.limit=7", {"evaluate"}),
        ("runtime.device=cpu", set[str]()),
        ("runtime.evaluation_tokens=64", set[str]()),
        ("recovery.adapter={method: rora, rank: 16, alpha: 16, dropout: 0.0, targets: all-linear}", set[str]()),
    ],
)
def test_a_change_reaches_just_what_rests_on_it(override: str, changed: set[str], tmp_path: Path):
    path = shipped_folder() / "tiny.yaml"
    before, after = keys(path, store=tmp_path), keys(path, override, store=tmp_path)
    differing = {label for label in before if before[label] != after[label]}
    if "evaluation.limit" in override:  # a limit is of suites, not of perplexity
        assert differing == {label for label in before if label.startswith("evaluate") and "heldout" not in label}
    else:
        assert differing == {label for label in before if any(label.startswith(prefix) for prefix in changed)}


def test_other_scores_make_exports_anew_for_their_cards_and_not_what_exports_score(tmp_path: Path):
    path, exports = shipped_folder() / "tiny.yaml", "export=[gguf:f16, quantized:nf4]"
    before = keys(path, exports, store=tmp_path)
    after = keys(path, exports, "evaluation.limit=7", store=tmp_path)  # a limit is of suites, not of perplexity
    differing = {label for label in before if before[label] != after[label] and "synthetic_" not in label}
    assert differing == {"export gguf-f16", "export quantized-nf4"}
    assert "evaluate recovered-nf4 heldout" in before


def test_the_version_of_the_method_that_drops_layers_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, depth = shipped_folder() / "tiny.yaml", "pruning.depth={layers: 1}"
    dropping, widths = keys(path, depth, store=tmp_path), keys(path, store=tmp_path)
    monkeypatch.setattr(criteria.load("block_influence"), "VERSION", 99)
    assert keys(path, depth, store=tmp_path)["prune"] != dropping["prune"]
    assert keys(path, store=tmp_path) == widths


BASE = """
name: x
model: {source: "synthetic:0#model"}
pruning: {method: llm_pruner, ratio: 0.2, calibration: {source: "synthetic:0#text.jsonl", field: text}}
recovery:
  adapter: {method: lora}
  tokens: 4096
  data: [{source: "synthetic:0#text.jsonl", field: text}]
evaluation: {suites: [{name: synthetic_questions, source: "synthetic:0#suites/synthetic_questions.jsonl"}]}
"""


def problems(tmp_path: Path, text: str, *overrides: str) -> str:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        config_file.load(path, overrides)
    assert error.value.exit_code == 2
    return str(error.value)


def test_the_base_of_these_tests_is_valid(tmp_path: Path):
    (tmp_path / "x.yaml").write_text(BASE)
    assert config_file.load(tmp_path / "x.yaml").name == "x"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pruning.ratoi=0.3", "x.yaml: pruning.ratoi: unknown key (did you mean 'ratio'?)"),
        ("recovery.adapter.rnak=3", "recovery.adapter.rnak: unknown key (did you mean 'rank'?)"),
        ("pruning.calibration.smaples=3", "pruning.calibration.smaples: unknown key (did you mean 'samples'?)"),
        ("recovery.data.0.wieght=3", "recovery.data.0.wieght: unknown key (did you mean 'weight'?)"),
        ("evaluaton={}", "evaluaton: unknown key (did you mean 'evaluation'?)"),
        ("calibration={}", "calibration: unknown key"),
        ("pruning.ratio=1.2", "pruning.ratio: Input should be less than 1 (got 1.2)"),
        ("pruning.method=llm_prune", "no method is called 'llm_prune' (did you mean 'llm_pruner'?)"),
        ("recovery.adapter.method=roar", "no method is called 'roar' (did you mean 'rora'?)"),
        ("evaluation.suites=[piqua]", "no suite is called 'piqua' (did you mean 'piqa'?)"),
        ("model.source=hub", "a source begins with one of"),
        ("model.source='pypi:a==1#b.gguf'", "no sha256 for a==1, which model.source needs"),
        ("recovery.tokens=abc", "recovery.tokens: Input should be a valid integer"),
        ("pruning.protect={first: 4}", "set shape: free"),
        ("recovery.data=[]", "recovery.data: missing"),
        ("evaluation={}", "nothing to score"),
    ],
)
def test_a_bad_value_is_named_with_its_place(tmp_path: Path, override: str, message: str):
    assert message in problems(tmp_path, BASE, override)


def test_every_problem_is_told_at_once(tmp_path: Path):
    text = problems(tmp_path, BASE, "pruning.ratio=2", "recovery.adapter.rnak=3", "model.dtype=int8")
    assert len(text.splitlines()) == 3


def test_a_key_given_twice_is_refused_with_its_lines(tmp_path: Path):
    assert "key 'name' is given twice, in lines 2 and 3" in problems(
        tmp_path, BASE.replace("name: x", "name: x\nname: y")
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "write it as key.path=value"),
        ("recovery.data.7.weight=1", "this is a list of 1 items"),
        ("name.x=1", "name is a single value"),
        ("seed=[1", "not a YAML value"),
    ],
)
def test_a_bad_override_says_how_to_write_it(tmp_path: Path, override: str, message: str):
    assert message in problems(tmp_path, BASE, override)


def test_a_missing_file_lists_the_shipped_ones(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no such config file; shipped ones are .*tiny\.yaml"):
        config_file.load(tmp_path / "nothing.yaml")


def test_a_file_nested_too_deeply_is_told(tmp_path: Path):
    (tmp_path / "deep.yaml").write_text("- " * 3000 + "1")
    with pytest.raises(ConfigError, match=r"deep\.yaml: not valid YAML: nested too deeply"):
        config_file.load(tmp_path / "deep.yaml")


def test_a_shipped_config_goes_by_its_name_and_no_other_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert config_file.read(Path("tiny.yaml")) == config_file.read(Path("./configs/tiny.yaml"))
    with pytest.raises(ConfigError, match="no such config file"):
        config_file.load(Path("elsewhere/configs/tiny.yaml"))


@pytest.mark.parametrize("said", ["{{ source }}", "{? [a] : 1}"])
def test_a_key_that_is_no_single_value_is_refused(tmp_path: Path, said: str):
    assert "a key is a single value" in problems(tmp_path, BASE.replace('{source: "synthetic:0#model"}', said))


def test_a_hub_model_without_a_network_is_a_source_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unreachable(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", unreachable)
    with pytest.raises(SourceError, match="the hub is not in reach"):
        steps(shipped_folder() / "smollm2-135m.yaml", store=tmp_path)

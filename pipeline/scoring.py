"""The `evaluate` stage: one model on one suite or text. Items are kept; what was scored before is not scored again."""

import json
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation import items, suites
from evaluation.generate import score_generated
from evaluation.perplexity import perplexity
from evaluation.score import score
from pipeline import rows
from pipeline.sections import PerplexityConfig, RuntimeConfig, SuiteConfig
from pipeline.sources import Sources
from pipeline.steps import Step
from pipeline.store import Artifact, Store, Workspace

Progress = Callable[[int, int, str], None]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    step: Step,
    sources: Sources,
    store: Store,
    workspace: Workspace,
    runtime: RuntimeConfig,
    progress: Progress,
    fresh: bool,
) -> dict[str, Any]:
    """Score into `workspace.out` (result.json, items.jsonl). Returns what the manifest shall say.

    `fresh` scores every item anew, even where the store has it.
    """
    scored, said = step.scored, {}
    if isinstance(scored, PerplexityConfig):
        texts = rows.texts(sources, scored)
        result = perplexity(model, tokenizer, texts, scored.window, scored.tokens, progress=progress)
    else:
        assert isinstance(scored, SuiteConfig)
        local, settings = scored.rows(), step.material["settings"]
        before = None if fresh else scored_before(store, step.material)
        suite = suites.load(scored.name)
        outcome = (score_generated if suite.protocol == "B" else score)(
            model,
            tokenizer,
            suite,
            rows=rows.read_rows(sources, local) if local else None,
            limit=settings["limit"],
            tokens_per_batch=runtime.evaluation_tokens,
            add_bos=settings["add_bos"],
            progress=progress,
            revision=None if local else step.material["rows"]["commit"],
            known=items.read(before.path / items.ITEMS) if before else (),
        )
        result = outcome.metrics
        if before:
            known = min(before.manifest["report"]["n"], len(outcome.items))
            said["reused"] = {"key": before.key, "items": known}
        items.write(workspace.out / items.ITEMS, outcome.items)
    parameters = list(model.parameters())  # tied ones once
    size = {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    }
    (workspace.out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return {"report": result, "model": size, **said}


def scored_before(store: Store, material: dict[str, Any]) -> Artifact | None:
    """The artifact with most items whose key would be this one's but for the limit: same model, rows and settings."""

    def unlimited(said: dict[str, Any]) -> dict[str, Any]:
        settings = {name: value for name, value in (said.get("settings") or {}).items() if name != "limit"}
        return {**said, "settings": settings}

    alike = [
        artifact
        for artifact in store.artifacts("evaluate")
        if unlimited(artifact.manifest["material"]) == unlimited(material) and (artifact.path / items.ITEMS).is_file()
    ]
    return max(alike, key=lambda artifact: artifact.manifest["report"]["n"], default=None)

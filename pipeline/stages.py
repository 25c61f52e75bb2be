"""What each stage does once it must: load, call the package that knows how, save, say what happened.

Imported only when something has to be built: this is where torch comes in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import calibration, exporting, processes, recovering, rows, scoring
from pipeline.config import RunConfig
from pipeline.errors import ConfigError, StageError
from pipeline.export import check, quantized
from pipeline.sections import RuntimeConfig
from pipeline.sources import Sources
from pipeline.steps import Step
from pipeline.store import Store, Workspace
from pruning import checkpoint
from pruning.placement import Placement, place
from pruning.prune import prune
from pruning.statistics import measure
from recovery import saved
from recovery.merge import merge
from recovery.saved import Saved

Progress = Callable[[int, int, str], None]
STATISTICS = "statistics.safetensors"
MERGE_CHECK_TOKENS = 256  # real tokens on which the adapted and the merged model are compared
MERGE_TOLERANCE = 1e-3  # of logits, in float32; rounding to 16 bits moves them by more, which is recorded


@dataclass
class Runner:
    """One run's means: its config, sources and store, and the model that was loaded last."""

    config: RunConfig
    sources: Sources
    store: Store
    progress: Progress = lambda done, total, note: None
    fresh: bool = False  # take nothing from results of other keys
    shown: Path | None = None  # the run's folder, for what is shown while work goes on
    _loaded: tuple[str, PreTrainedModel, PreTrainedTokenizerBase] | None = field(default=None, init=False)

    def build(self, step: Step, workspace: Workspace) -> dict[str, Any]:
        """Build one step into `workspace.out`. Returns what its manifest shall say."""
        builders = {
            "statistics": self._statistics,
            "prune": self._prune,
            "teacher": partial(recovering.teach, self),
            "recover": partial(recovering.recover, self),
            "merge": self._merge,
            "evaluate": self._evaluate,
            "export": partial(exporting.export, self),
        }
        return builders[step.stage](step, workspace)

    def folder(self, step: Step) -> Path:
        """The folder of the model that a step reads."""
        made_by = next((inner for inner in reversed(step.inputs) if inner.stage in ("prune", "merge", "export")), None)
        if made_by is None:
            return self.dense_folder()
        folder = self.store.folder(made_by.stage, made_by.key)
        return folder if made_by.stage == "export" else folder / "model"

    def dense_folder(self) -> Path:
        """The folder of the dense model."""
        return self.sources.model_folder(self.config.model.source)

    def teacher_folder(self) -> Path:
        """The folder of the model that teaches."""
        return self.sources.model_folder(self.config.teacher or self.config.model.source)

    def adapter(self, step: Step) -> Saved:
        """The adapter that a step puts on its model: trained by this run, or read."""
        recover = next((inner for inner in step.inputs if inner.stage == "recover"), None)
        if recover:
            return saved.read(self.store.folder(recover.stage, recover.key) / "adapter")
        assert self.config.adapter is not None
        return self.sources.adapter(self.config.adapter)

    def device(self) -> str:
        """Where the run computes."""
        return device(self.config.runtime.device)

    def load(
        self, folder: Path, placement: Placement = "whole", place: str | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A folder's model, in the run's dtype and on its device (or `place`), and tokenizer."""
        dtype: torch.dtype = getattr(torch, self.config.model.dtype)
        where = place or self.device()
        if quantized.is_quantized(folder):
            return quantized.load(folder, where), checkpoint.load_tokenizer(folder)
        model = checkpoint.load(folder, dtype, where, placement)
        return model, checkpoint.load_tokenizer(folder)

    def _statistics(self, step: Step, workspace: Workspace) -> dict[str, Any]:
        assert step.statistic is not None
        model, tokenizer = self.load(self.folder(step), self.config.runtime.placement)
        windows, _ = self._windows(tokenizer)
        found = measure(model, windows, [step.statistic], self.progress)
        save_file({name: values.contiguous() for name, values in found.items()}, workspace.out / STATISTICS)
        return {"report": {"tokens": windows.numel()}}

    def _prune(self, step: Step, workspace: Workspace) -> dict[str, Any]:
        assert self.config.pruning is not None
        runtime = self.config.runtime
        model, tokenizer = self.load(self.folder(step), runtime.placement)
        statistics: dict[str, torch.Tensor] = {}
        for measured in step.inputs:
            statistics |= load_file(self.store.folder("statistics", measured.key) / STATISTICS)
        windows, others = self._windows(tokenizer) if self.config.calibration else (None, None)

        def again(cut: PreTrainedModel) -> PreTrainedModel:
            return place(cut, runtime.placement, device(runtime.device))

        result = prune(model, windows, self.config.pruning, statistics, others, self.progress, again)
        checkpoint.save(result.model, tokenizer, workspace.out / "model")
        checkpoint.write_structures(workspace.out, result.kept, result.original)
        return {"report": result.report}

    def _windows(self, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
        """Calibration tokens of the criterion and of the compensation. Both are drawn before anything is measured."""
        assert self.config.calibration is not None
        assert self.config.pruning is not None
        own = self.config.pruning.compensation
        changed = {name: value for name in ("samples", "length") if (value := getattr(own, name))}
        texts = rows.texts(self.sources, self.config.calibration)
        first, second = (
            torch.tensor(calibration.windows(tokenizer, texts, self.config.calibration.model_copy(update=update)))
            for update in ({}, changed)
        )
        return first, second

    def _merge(self, step: Step, workspace: Workspace) -> dict[str, Any]:
        model, tokenizer = self.load(self.folder(step))
        adapter = self.adapter(step)
        layers = saved.attach(model, adapter)
        if self.config.recovery:
            found = rows.examples(self.sources, self.config.data[0], self.config.recovery.max_length)
            texts = [example.prompt + example.response for example in found[:64]]
        else:
            texts = [check.passage()]
        ids: Any = tokenizer("\n".join(texts), return_tensors="pt")["input_ids"]
        ids = ids[:, :MERGE_CHECK_TOKENS]
        merged, difference = merge(model, ids)
        assert difference is not None
        # Said so that a difference that is no number fails, too.
        if not difference <= (MERGE_TOLERANCE if self.config.model.dtype == "float32" else math.inf):
            raise StageError(f"merge: logits moved by {difference:.2g}, more than {MERGE_TOLERANCE}: nothing was saved")
        checkpoint.save(merged, tokenizer, workspace.out / "model")
        said = {} if self.config.recovery else {"adapter": {"folder": adapter.folder.name, "layers": len(layers)}}
        return {"report": {"largest_logit_difference": difference, "tokens_compared": ids.shape[1], **said}}

    def _evaluate(self, step: Step, workspace: Workspace) -> dict[str, Any]:
        folder = self.folder(step)
        if self._loaded is None or self._loaded[0] != str(folder):
            self._loaded = None  # the old model goes before the new one comes
            self._loaded = (str(folder), *self.load(folder))
        _, model, tokenizer = self._loaded
        means = (self.sources, self.store, workspace, self.config.runtime, self.progress, self.fresh)
        said = scoring.evaluate(model, tokenizer, step, *means)
        if quantized.is_quantized(folder):
            said["model"] = {"parameters": model.num_parameters(), "bytes": quantized.weight_bytes(folder)}
        return said


def prepare(runtime: RuntimeConfig) -> None:
    """Settings of this process: threads, a device that is there, and libraries that keep their bars to themselves."""
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    device(runtime.device)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def device(name: str) -> str:
    """The device that `auto` means here. Raises ConfigError when the asked one is not there."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        return processes.device() if cuda else "cpu"
    if (name.startswith("cuda") and not cuda) or (name == "mps" and not torch.backends.mps.is_available()):
        raise ConfigError(f"runtime.device: {name}: torch {torch.__version__} sees no GPU here; set it to auto or cpu")
    return name

"""The shared-prefix scorer: lm-eval's requests answered with every common beginning run once.

`SharedPrefixLM` is lm-eval's own `HFLM` (loading, tokens, truncation, generation) with another way to compute
log-likelihoods: rows of shared prefixes (`evaluation/packing.py`), logits at answer positions only, float32 sums.
Its name for lm-eval is `regrow`, once this module is imported:

    import lm_eval, evaluation.scorer
    lm_eval.simple_evaluate(model="regrow", model_args={"pretrained": FOLDER, "tokens_per_batch": 4096}, tasks=["piqa"])
"""

# lm-eval's registration decorator hides HFLM's own type from the checker.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportAbstractUsage=false

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from lm_eval import utils
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from evaluation import allocator, passes
from evaluation.packing import Ids, Row, batches, fill, pack, shared, tree

Request = tuple[Any, list[int], list[int]]  # what is asked, context, continuation
Answer = tuple[float, bool]
Progress = Callable[[int, int, str], None]

TOKENS = {"cpu": 2048}  # tokens of one forward pass with padding
TOKENS_ELSEWHERE = 16384
PAIRS = 2**25  # entries of one forward pass's attention mask
LOGITS = 512  # positions whose logits are held at once
ATTENTION = {"flat": ("sdpa",), "padded": ("sdpa", "eager")}  # what a model may have chosen: it takes a 4-D mask

Way = Literal["flat", "padded", "alone"]  # rows end to end, rows beside each other, requests as HFLM runs them
# Models that were tried, and the best way each can under each of the settings that it hangs on.
WAYS: "WeakKeyDictionary[Any, dict[tuple[Any, ...], Way]]" = WeakKeyDictionary()

log = logging.getLogger("lm_eval.regrow")


@register_model("regrow")
class SharedPrefixLM(HFLM):
    """HFLM that runs what requests have in common once. Every argument of HFLM holds.

    `tokens_per_batch` bounds a forward pass (padding included); `batch_size` counts for generation only. Answers do
    not depend on either, nor on the order of requests, beyond rounding. Log-likelihoods are summed in float32
    whatever the model's dtype. `truncated` counts requests that lost tokens of their context to the model's window.
    Models that pay no heed to a mask and positions of ours (found out on a few tokens) are run as HFLM runs them.
    """

    def __init__(self, pretrained: Any, tokens_per_batch: int | None = None, **arguments: Any) -> None:
        super().__init__(pretrained=pretrained, **arguments)
        self.tokens_per_batch = tokens_per_batch or TOKENS.get(self.device.type, TOKENS_ELSEWHERE)
        self.truncated = 0
        self.report: Progress = lambda done, total, note: None

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Summed log-likelihood of every whole text, in windows as HFLM cuts them; all windows in one go."""
        windows: list[Request] = []
        counts: list[int] = []
        for (text,) in (request.args for request in requests):
            cut = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs = [utils.make_disjoint_window(pair) for pair in cut]
            windows += [(None, *pair) for pair in pairs]
            counts.append(len(pairs))
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = [sum(next(answers)[0] for _ in range(count)) for count in counts]
        for request, found in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found)
        return sums

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """(sum of log-likelihoods, all targets are the argmax) for every request, in order.

        Raises ValueError for a continuation without tokens, or longer than the model's window.
        """
        if not requests:
            return []
        for asked, _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                what = f"a continuation of {len(continuation)} tokens"
                raise ValueError(f"{what} cannot be scored in a window of {self.max_length} tokens: {asked!r:.200}")
        window = self.max_length + 1
        self.truncated += sum(len(context) + len(continuation) > window for _, context, continuation in requests)
        if self.way() == "alone":
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        # When too long, tokens fall off the left, as in HFLM; the last token is only predicted.
        inputs = [tuple((context + continuation)[-window:][:-1]) for _, context, continuation in requests]
        quiet = disable_tqdm or self.rank != 0
        title = "Running loglikelihood requests"
        with tqdm(total=len(set(inputs)), disable=quiet, desc=title) as bar, allocator.keeping():
            answers = self._answers(inputs, [continuation for _, _, continuation in requests], bar.update)
        for (asked, _, _), answer in zip(requests, answers, strict=True):
            if asked is not None:  # windows of a rolling request have no name of their own
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    @torch.inference_mode()
    def _answers(
        self,
        inputs: list[Ids],
        targets: list[list[int]],
        step: Callable[[int], Any] = lambda count: None,
        rows: list[Row] | None = None,
        way: Way | None = None,
    ) -> list[Answer]:
        """Answers for distinct or repeated inputs, whose last len(targets[i]) positions predict targets[i]."""
        asked: dict[Ids, list[int]] = {}
        for index, ids in enumerate(inputs):
            asked.setdefault(ids, []).append(index)
        sequences = list(asked)
        first = [len(ids) - max(len(targets[index]) for index in asked[ids]) for ids in sequences]
        rows = rows or pack(sequences, first)
        answers: list[Answer] = [(0.0, False)] * len(inputs)
        stem: Ids = ()
        cache: passes.Cache = None
        done = 0
        flat = (way or self.way()) == "flat"
        budget = self.tokens_per_batch
        for batch in fill(rows, budget) if flat else batches(rows, budget, PAIRS):
            with self._autocast():
                if batch[0].stem != stem:
                    stem, cache = batch[0].stem, None
                    cache = passes.prefill(self.model, stem) if stem else None
                hidden, starts = (passes.flat if flat else passes.padded)(self.model, batch, cache)
            requests: list[int] = []
            nodes: list[int] = []
            for start, row in zip(starts, batch, strict=True):
                for sequence, path in zip(row.sequences, row.paths, strict=True):
                    for index in asked[sequences[sequence]]:
                        requests.append(index)
                        nodes += [start + node for node in path[len(path) - len(targets[index]) :]]
            found = self._score(hidden, nodes, [targets[request] for request in requests])
            for index, answer in zip(requests, found, strict=True):
                answers[index] = answer
            count = sum(len(row.sequences) for row in batch)
            done += count
            step(count)
            self.report(done, len(sequences), f"up to {len(batch[0].stem) + len(batch[0].tokens)} tokens wide")
        return answers

    def _score(self, hidden: torch.Tensor, nodes: list[int], targets: list[list[int]]) -> list[Answer]:
        """Answers from hidden states [n, hidden]: `nodes` are the predicting ones, one a target token."""
        wanted, place = np.unique(np.array(nodes), return_inverse=True)
        flat = torch.tensor([token for part in targets for token in part], device=self.device)
        scores = torch.zeros(len(flat), device=self.device)
        greedy = torch.zeros(len(flat), dtype=torch.bool, device=self.device)
        head = self.model.get_output_embeddings()
        for start in range(0, len(wanted), LOGITS):
            part = torch.from_numpy(wanted[start : start + LOGITS]).to(self.device)
            with self._autocast():
                logits = head(hidden[part]).float()
            here = np.flatnonzero((place >= start) & (place < start + LOGITS))
            into, at = torch.from_numpy(here).to(self.device), torch.from_numpy(place[here] - start).to(self.device)
            scores[into] = logits[at, flat[into]]
            # In place: another tensor of this size costs more time than the sum.
            largest, best = logits.max(1)
            normaliser = logits.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest)
            scores[into] -= normaliser[at]
            greedy[into] = best[at] == flat[into]
        lengths = [len(part) for part in targets]
        return [
            (float(found.sum()), bool(equal.all()))
            for found, equal in zip(scores.cpu().split(lengths), greedy.cpu().split(lengths), strict=True)
        ]

    def _autocast(self) -> Any:
        kind = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=kind, enabled=kind is not None)

    def way(self) -> Way:
        """The fastest way that gives this model's own log-likelihoods; tried once, on a few made-up tokens."""
        chosen: str = self.model.config.get_text_config()._attn_implementation
        asked = (self.max_length, self.device.type, self.model.dtype, self.mixed_precision_dtype, chosen)
        known = WAYS.setdefault(self.model, {})
        if asked not in known:
            ways: list[Way] = ["flat", "padded", "alone"] if self.device.type == "cpu" else ["padded", "alone"]
            known[asked] = next(way for way in ways if way == "alone" or self._goes_well(way))
            if known[asked] == "alone":
                log.warning("regrow: this model cannot run shared prefixes; requests are run one by one, as HFLM does")
        return known[asked]

    @torch.inference_mode()
    def _goes_well(self, way: Way) -> bool:
        config: Any = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        takes_masks = config._attn_implementation in ATTENTION[way]
        if self.backend != "causal" or not takes_masks or kinds or (window and window < self.max_length):
            return False
        made_up = [(7919 * index + 13) % int(config.vocab_size) for index in range(30)]
        inputs = [tuple(made_up[: min(18, self.max_length - 4)] + made_up[at : at + 4]) for at in (18, 22, 26)]
        targets = [list(ids[-3:]) for ids in inputs]
        order = sorted(range(3), key=lambda index: inputs[index])
        common = [shared(inputs[a], inputs[b]) for a, b in pairwise(order)]
        # A tree, a row by itself beside it, and both behind a cached stem.
        for stem in (0, min(8, *common)):
            rows = [tree(order[:2], inputs, common[:1], stem), tree(order[2:], inputs, [], stem)]
            try:
                found = self._answers(inputs, targets, rows=rows, way=way)
            except (TypeError, ValueError, AttributeError, RuntimeError) as error:
                log.warning("regrow: %s rows failed on a few tokens: %s", way, error)
                return False
            for ids, target, (packed, _) in zip(inputs, targets, found, strict=True):
                with self._autocast():
                    logits = self.model(input_ids=torch.tensor([ids], device=self.device)).logits[0, -3:].float()
                alone = logits.log_softmax(1).gather(1, torch.tensor(target, device=self.device)[:, None]).sum()
                # Rounding of 16-bit logits moves a sum of three by tenths, a wrong mask or position by far more.
                exact = self.model.dtype == torch.float32 and self.mixed_precision_dtype is None
                if not abs(float(alone) - packed) <= (1e-3 if exact else 0.75):
                    return False
        return True

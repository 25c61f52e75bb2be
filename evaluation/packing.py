"""Token sequences as rows of shared prefixes: what several sequences begin with is run once.

A row is a tree of tokens, written depth first. A token's position is its depth and it sees its ancestors alone, so
every root-to-leaf path computes what it would compute by itself. A `stem` is a beginning that many rows share: it is
run once, its keys and values are cached, and the rows go on from there. No torch here: plain lists and numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ids = tuple[int, ...]
STRANGERS = 1024  # pairs of tokens in one row that do not see each other and cost as much time as one token more
ROW = 1024  # tokens of a row with branches; one sequence may be longer
STEM = 32  # tokens: a shorter shared beginning is not worth a cache
SAVED = 256  # tokens that a stem has to save
PASS = 1 / 32  # of a full batch: what a forward pass costs besides its tokens
LONG = 512  # tokens: a longer beginning is run as a stem even for one row, since a plain causal pass needs no mask


@dataclass
class Row:
    """One tree. `paths` gives for every sequence the row's node at each depth from `stem` on (after the stem)."""

    sequences: list[int]  # indices into what was packed
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    stem: Ids = ()

    @property
    def chain(self) -> bool:
        """No branches: an ordinary causal pass computes it."""
        return self.positions == list(range(len(self.stem), len(self.stem) + len(self.tokens)))

    def mask(self, width: int | None = None) -> npt.NDArray[np.bool_]:
        """Who sees whom, [width, stem + width]: ancestors and itself; `width` is the row's or more.

        Padding sees itself, or softmax gives NaN.
        """
        width = width or len(self.tokens)
        stem, done = len(self.stem), 0
        sees = np.zeros((width, stem + width), dtype=bool)
        sees[: len(self.tokens), :stem] = True
        for path in self.paths:
            nodes = np.array(path)
            new = nodes[nodes >= done]
            sees[np.ix_(new, stem + nodes[nodes < done])] = True
            sees[np.ix_(new, stem + new)] = np.tri(len(new), dtype=bool)
            done += len(new)
        np.fill_diagonal(sees[:, stem:], val=True)
        return sees


def shared(left: Ids, right: Ids) -> int:
    """How many tokens two sequences begin with in common."""
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:
        return shorter
    return next(index for index in range(shorter) if left[index] != right[index])


def pack(sequences: Sequence[Ids], first: Sequence[int]) -> list[Row]:
    """Rows for distinct sequences. `first[i]` is the first depth of sequence i whose hidden state is wanted.

    Sorted sequences are taken one after the other: one joins the row as long as the tokens it shares with the one
    before are worth more than attention between strangers costs. What a stem holds is no reason to share a row.
    """
    order = sorted(range(len(sequences)), key=lambda index: sequences[index])
    common = [0] + [shared(sequences[a], sequences[b]) for a, b in pairwise(order)]
    lengths, wanted = [len(sequences[index]) for index in order], [first[index] for index in order]
    stems = [0] * len(order)
    stems = _stems(_groups(lengths, common, stems), common, wanted)
    return [
        tree(order[low:high], sequences, common[low + 1 : high], stems[low])
        for low, high in _groups(lengths, common, stems)
    ]


def batches(rows: Sequence[Row], budget: int, pairs: int) -> list[list[Row]]:
    """Rows of one stem, of like widths, longest first; at most `budget` tokens with padding, or one row.

    Cut so that padding and passes, each reckoned as PASS of the budget, cost least. `pairs` bounds tokens times tokens
    seen, which is what a mask takes.
    """
    made: list[list[Row]] = []
    kinds: dict[tuple[Ids, bool], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.stem, row.chain), []).append(row)
    for (stem, chain), alike in kinds.items():
        alike.sort(key=lambda row: -len(row.tokens))
        masked = bool(stem) or not chain
        cheapest = [0.0, *[float("inf")] * len(alike)]  # of the first rows, by how many
        begins = [0] * (len(alike) + 1)
        for start, row in enumerate(alike):
            width = len(row.tokens)
            count = budget // width
            if masked:
                count = min(count, pairs // (width * (width + len(stem))))
            for end in range(start + 1, min(start + max(1, count), len(alike)) + 1):
                cost = cheapest[start] + (end - start) * width + budget * PASS
                if cost < cheapest[end]:
                    cheapest[end], begins[end] = cost, start
        end = len(alike)
        while end:
            made.append(alike[begins[end] : end])
            end = begins[end]
    # Batches of one stem stay together, so that one cache is held at a time.
    largest: dict[Ids, int] = {}
    for batch in made:
        largest[batch[0].stem] = max(largest.get(batch[0].stem, 0), len(batch[0].stem) + len(batch[0].tokens))
    return sorted(made, key=lambda batch: (-largest[batch[0].stem], batch[0].stem, -len(batch[0].tokens)))


def fill(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """Rows of one stem to be laid end to end, longest first; at most `budget` tokens, or one row."""
    made: list[list[Row]] = []
    size = 0
    for row in sorted(rows, key=lambda row: (-len(row.stem), row.stem, -len(row.tokens))):
        if not made or made[-1][0].stem != row.stem or size + len(row.tokens) > budget:
            made.append([])
            size = 0
        made[-1].append(row)
        size += len(row.tokens)
    return made


def tree(members: list[int], sequences: Sequence[Ids], common: list[int], stem: int) -> Row:
    """The row of sorted sequences; `common[i]` tokens are shared by members i and i + 1, the stem's included."""
    row = Row(members, stem=sequences[members[0]][:stem])
    path: list[int] = []
    for index, keep in zip(members, [stem, *common], strict=True):
        sequence = sequences[index]
        path = path[: keep - stem] + [len(row.tokens) + offset for offset in range(len(sequence) - keep)]
        row.tokens += sequence[keep:]
        row.positions += range(keep, len(sequence))
        row.paths.append(path)
    return row


def _groups(lengths: list[int], common: list[int], stems: list[int]) -> list[tuple[int, int]]:
    """[from, to) of the sorted sequences that share a row; `common[i]` is what i shares with the one before it."""
    groups: list[tuple[int, int]] = []
    start = size = 0
    for at, length in enumerate(lengths):
        new, saved = length - common[at], common[at] - stems[at]
        joins = saved * STRANGERS > 2 * size * new and size + new <= ROW + lengths[start]
        if at and stems[at] == stems[at - 1] and joins:
            size += new
            continue
        if at:
            groups.append((start, at))
        start, size = at, length - stems[at]
    return [*groups, (start, len(lengths))] if lengths else []


def _stems(groups: list[tuple[int, int]], common: list[int], wanted: list[int]) -> list[int]:
    """For every sorted sequence, how many tokens it takes from a cache that neighbouring rows share; 0 for none."""
    own = [min([*wanted[low:high], *common[low + 1 : high]]) for low, high in groups]
    stems = [0] * len(wanted)
    at = 0
    while at < len(groups):
        length, end = own[at], at + 1
        while end < len(groups):
            further = min(length, own[end], common[groups[end][0]])
            if further < STEM or further * (end - at) < length * (end - at - 1):
                break
            length, end = further, end + 1
        (low, first_high), high = groups[at], groups[end - 1][1]
        branched = end - at > 1 or first_high - low > 1
        if length >= STEM and (length * (end - at - 1) >= SAVED or (length >= LONG and branched)):
            stems[low:high] = [length] * (high - low)
        at = end
    return stems

"""The two records that every part of kvpref passes around: a `Sequence` of tokens and a `Group` of sequences.

Integers in numpy arrays: no tensors, so data workers, batchers and tests can use them without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpref.prefix.runs import joined
from kvpref.records.images import PlacedImage, check_places, own_ids, placeholder_ids

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False, repr=False)
class Sequence:
    """One full prompt+response token list; the response may be several turns, with other roles' messages between them.

    Args:
        input_ids: Token ids of prompt and response together, at least one.
        scored: One flag per token: whether its log-prob counts in the loss. The first token has no predictor, so its
            flag must be False.
        images: The images in the prompt, in order of position.
        weights: Weight of each scored token in every loss and metric, at least 0; None for 1 each.
        earlier: If a later turn's history differs from what an earlier turn answered (because, for example, the chat
            template drops the thinking of earlier turns): the sequences in which those earlier turns are scored, in
            order. A loss reads them and this one as one response.

    Attributes:
        ids: (T,) int64, `input_ids` as a read-only array.
        flags: (T,) bool, `scored` as a read-only array.

    Raises:
        ValueError: If the lengths differ, there are no tokens, the first token is scored, a weight is negative or not
            finite, images do not match their placeholders, or an earlier sequence has earlier ones.
    """

    ids: IntArray
    flags: BoolArray
    images: tuple[PlacedImage, ...]
    weights: tuple[float, ...] | None
    earlier: tuple[Sequence, ...]

    def __init__(
        self,
        input_ids: AbstractSequence[int] | IntArray,
        scored: AbstractSequence[bool] | BoolArray,
        images: AbstractSequence[PlacedImage] = (),
        weights: AbstractSequence[float] | None = None,
        earlier: AbstractSequence[Sequence] = (),
    ) -> None:
        # Frozen dataclass with normalising constructor: lists are accepted, arrays are kept.
        object.__setattr__(self, "ids", _constant(input_ids, np.int64))
        object.__setattr__(self, "flags", _constant(scored, np.bool_))
        object.__setattr__(self, "images", tuple(images))
        object.__setattr__(self, "weights", None if weights is None else tuple(map(float, weights)))
        object.__setattr__(self, "earlier", tuple(earlier))
        if not len(self.ids):
            raise ValueError("a Sequence needs at least one token; got an empty input_ids")
        if len(self.ids) != len(self.flags):
            raise ValueError(
                f"input_ids and scored must have one entry per token; got {len(self.ids)} and {len(self.flags)}"
            )
        if self.flags[0]:
            raise ValueError(
                "the first token of a Sequence cannot be scored, because no token before it predicts it; "
                "put a BOS token before an empty prompt"
            )
        if self.weights is not None and len(self.weights) != self.num_scored:
            raise ValueError(
                f"weights must have one number per scored token; got {len(self.weights)} for {self.num_scored}"
            )
        if self.weights is not None and not all(0 <= weight < math.inf for weight in self.weights):
            bad = next(weight for weight in self.weights if not 0 <= weight < math.inf)
            raise ValueError(f"weights must be finite numbers of at least 0; got {bad}")
        if any(part.earlier for part in self.earlier):
            raise ValueError("an earlier sequence cannot have earlier ones; give them all in one list")
        if self.images:
            check_places(self.images, self.input_ids, self.scored)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def input_ids(self) -> tuple[int, ...]:
        """Token ids of prompt and response together."""
        return tuple(self.ids.tolist())

    @cached_property
    def scored(self) -> tuple[bool, ...]:
        """One flag per token: whether its log-prob counts in the loss."""
        return tuple(self.flags.tolist())

    @cached_property
    def num_scored(self) -> int:
        """Scored tokens of this sequence, not counting `earlier`."""
        return int(np.count_nonzero(self.flags))

    @property
    def parts(self) -> tuple[Sequence, ...]:
        """The token rows that a model runs: the earlier sequences and this one."""
        return (*self.earlier, self)

    @property
    def total_scored(self) -> int:
        """Scored tokens of all parts."""
        return self.num_scored + sum(part.num_scored for part in self.earlier)

    @property
    def total_weight(self) -> float:
        """Total weight of the scored tokens of all parts: their number, or the sum of their weights."""
        return sum(part.num_scored if part.weights is None else sum(part.weights) for part in self.parts)

    @property
    def turns(self) -> tuple[tuple[int, int], ...]:
        """The runs of scored tokens, as positions [first, stop)."""
        edges = np.flatnonzero(np.diff(self.flags, prepend=False, append=False))
        return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))

    @property
    def tree_ids(self) -> IntArray:
        """(T,) int64, the ids compared to find shared prefixes: token ids, with special ids for images' placeholders.

        Those are negative, valid only in this process, and equal exactly if images have equal keys. Images without a
        token between them are shared together or not at all, because a model may let their tokens see one another.
        """
        if not self.images:
            return self.ids
        ids = self.ids.copy()
        for images in _neighbours(self.images):
            own = iter(placeholder_ids([placed.image for placed in images]))
            for first, stop in (run for placed in images for run in placed.runs):
                ids[first:stop] = [next(own) for _ in range(first, stop)]
        return ids

    @property
    def image_runs(self) -> tuple[tuple[int, int], ...]:
        """Runs of image placeholders; images without a token between them form one run."""
        return joined(run for placed in self.images for run in placed.runs)

    @property
    def prompt_runs(self) -> tuple[tuple[int, int], ...]:
        """The prompt, the tokens before the first scored one, as one run."""
        return ((0, self._prompt_length),)

    @property
    def _prompt_length(self) -> int:
        return int(self.flags.argmax()) if self.flags.any() else len(self.ids)

    @property
    def whole_prompt_ids(self) -> IntArray:
        """Like `tree_ids`, but prompts (the tokens before the first scored one) are equal as wholes or not at all."""
        ids = self.tree_ids.copy()
        stop = self._prompt_length
        ids[:stop] = own_ids(("prompt", ids[:stop].tobytes()), stop)
        return ids

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return (
            np.array_equal(self.ids, other.ids)
            and np.array_equal(self.flags, other.flags)
            and (self.images, self.weights, self.earlier) == (other.images, other.weights, other.earlier)
        )

    def __hash__(self) -> int:
        return hash((self.ids.tobytes(), self.flags.tobytes(), self.images, self.weights, self.earlier))

    def __reduce__(self) -> tuple[Any, ...]:
        return Sequence, (self.ids, self.flags, self.images, self.weights, self.earlier)

    def __repr__(self) -> str:
        more = "".join(
            f", {name}={value!r}" for name in ("images", "weights", "earlier") if (value := getattr(self, name))
        )
        return f"Sequence(input_ids={self.input_ids!r}, scored={self.scored!r}{more})"

    @classmethod
    def from_prompt_and_response(
        cls, prompt_ids: AbstractSequence[int], response_ids: AbstractSequence[int]
    ) -> Sequence:
        """Join a prompt and a response; exactly the response's tokens are scored."""
        return cls((*prompt_ids, *response_ids), (False,) * len(prompt_ids) + (True,) * len(response_ids))


@dataclass(frozen=True)
class Group:
    """The sequences that answer one prompt (2 for DPO, N for best-of-N), with scores or labels.

    Args:
        sequences: At least one `Sequence`.
        scores: One float per sequence, or None where unrated. Higher is better.
        labels: One flag per sequence: True for preferred (chosen), False for not (rejected).
        id: Where the group came from, such as ``file:line``; used in error messages.
        columns: Extra columns of the data, by name. A list or tuple with one entry per sequence belongs to the
            sequences; anything else to the group.
        ranks: In place of scores, if only an order is known: one number per sequence, 1 for the best, or None where
            unranked. The scores are then the negated ranks, which losses that need more than an order refuse.

    Raises:
        ValueError: If there are no sequences, if scores, ranks or labels have a different length, or if both scores
            and ranks are given.
    """

    sequences: tuple[Sequence, ...]
    scores: tuple[float | None, ...] | None
    labels: tuple[bool, ...] | None
    id: str | None
    columns: Mapping[str, Any]
    ranks: tuple[float | None, ...] | None

    def __init__(
        self,
        sequences: AbstractSequence[Sequence],
        scores: AbstractSequence[float | None] | None = None,
        labels: AbstractSequence[bool] | None = None,
        id: str | None = None,
        columns: Mapping[str, Any] | None = None,
        ranks: AbstractSequence[float | None] | None = None,
    ) -> None:
        if ranks is not None:
            if scores is not None:
                raise ValueError(f"group {id!r}: both scores and ranks are given; keep one of the two")
            scores = [None if rank is None else -float(rank) for rank in ranks]
        object.__setattr__(self, "sequences", tuple(sequences))
        object.__setattr__(self, "scores", None if scores is None else tuple(scores))
        object.__setattr__(self, "ranks", None if ranks is None else tuple(ranks))
        object.__setattr__(self, "labels", None if labels is None else tuple(labels))
        object.__setattr__(self, "id", id)
        object.__setattr__(self, "columns", {} if columns is None else dict(columns))
        if not self.sequences:
            raise ValueError(f"group {id!r} has no sequences")
        rated = "scores" if self.ranks is None else "ranks"
        for name, values in ((rated, self.scores), ("labels", self.labels)):
            if values is not None and len(values) != len(self.sequences):
                raise ValueError(
                    f"group {id!r}: {name} must have one entry per sequence; "
                    f"got {len(values)} for {len(self.sequences)} sequences"
                )

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def parts(self) -> tuple[Sequence, ...]:
        """The token rows that a model runs: the parts of all sequences, in order."""
        return tuple(part for sequence in self.sequences for part in sequence.parts)

    def take(self, indices: AbstractSequence[int]) -> Group:
        """The group with only these sequences, in this order, and their scores, labels and column entries."""
        return Group(
            [self.sequences[index] for index in indices],
            scores=None if self.scores is None or self.ranks is not None else [self.scores[index] for index in indices],
            labels=None if self.labels is None else [self.labels[index] for index in indices],
            ranks=None if self.ranks is None else [self.ranks[index] for index in indices],
            id=self.id,
            columns={
                name: [value[index] for index in indices] if self.is_per_sequence(value) else value
                for name, value in self.columns.items()
            },
        )

    def is_per_sequence(self, value: Any) -> bool:
        """Whether the value of a column has one entry per sequence."""
        return isinstance(value, list | tuple) and len(value) == len(self.sequences)


def _constant(values: Any, dtype: Any) -> Any:
    """Values as a read-only array; a writable array is copied."""
    if isinstance(values, np.ndarray) and values.dtype == dtype and not values.flags.writeable:
        return values
    found = np.array(values, dtype=dtype)
    found.flags.writeable = False
    return found


def _neighbours(images: AbstractSequence[PlacedImage]) -> list[list[PlacedImage]]:
    """The images, with immediate neighbours grouped."""
    found: list[list[PlacedImage]] = []
    for placed in images:
        if found and found[-1][-1].runs[-1][1] == placed.runs[0][0]:
            found[-1].append(placed)
        else:
            found.append([placed])
    return found

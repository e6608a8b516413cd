"""The two records that every part of kvpref passes around: a `Sequence` of tokens and a `Group` of sequences.

Pure Python integers: no tensors, so data workers, batchers and tests can use them without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import Any

from kvpref.prefix.both_ways import joined
from kvpref.records.images import PlacedImage, check_places, own_ids, placeholder_ids


@dataclass(frozen=True)
class Sequence:
    """One full prompt+response token list.

    Args:
        input_ids: Token ids of prompt and response together, at least one.
        scored: One flag per token: does its log-prob count in the loss? The first token has no predictor, so its
            flag must be False.
        images: Those in the prompt, in order of position.

    Raises:
        ValueError: If the lengths differ, there are no tokens, the first token is scored, or images do not stand over
            their placeholders.
    """

    input_ids: tuple[int, ...]
    scored: tuple[bool, ...]
    images: tuple[PlacedImage, ...]

    def __init__(
        self,
        input_ids: AbstractSequence[int],
        scored: AbstractSequence[bool],
        images: AbstractSequence[PlacedImage] = (),
    ) -> None:
        # Frozen dataclass with normalising constructor: lists are accepted, tuples are kept.
        object.__setattr__(self, "input_ids", tuple(input_ids))
        object.__setattr__(self, "scored", tuple(scored))
        object.__setattr__(self, "images", tuple(images))
        if not self.input_ids:
            raise ValueError("a Sequence needs at least one token; got an empty input_ids")
        if len(self.input_ids) != len(self.scored):
            raise ValueError(
                f"input_ids and scored must have one entry per token; got {len(self.input_ids)} and {len(self.scored)}"
            )
        if self.scored[0]:
            raise ValueError(
                "the first token of a Sequence cannot be scored, because no token before it predicts it; "
                "put a BOS token before an empty prompt"
            )
        check_places(self.images, self.input_ids, self.scored)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tree_ids(self) -> tuple[int, ...]:
        """What is compared to find shared prefixes: the token ids, with ids of its own for each image's placeholders.

        Those are negative, hold in this process only, and are equal just where images have equal keys. Images without a
        token between them are shared together or not at all, because a model may let their tokens see one another.
        """
        if not self.images:
            return self.input_ids
        ids = list(self.input_ids)
        for images in _neighbours(self.images):
            own = iter(placeholder_ids([placed.image for placed in images]))
            for first, stop in (run for placed in images for run in placed.runs):
                ids[first:stop] = [next(own) for _ in range(first, stop)]
        return tuple(ids)

    @property
    def image_runs(self) -> tuple[tuple[int, int], ...]:
        """Where images stand, those without a token between them as one."""
        return joined(run for placed in self.images for run in placed.runs)

    @property
    def prompt_runs(self) -> tuple[tuple[int, int], ...]:
        """The prompt, the tokens before the first scored one, as one run."""
        return ((0, self._prompt_length),)

    @property
    def _prompt_length(self) -> int:
        return self.scored.index(True) if True in self.scored else len(self.input_ids)

    @property
    def whole_prompt_ids(self) -> tuple[int, ...]:
        """`tree_ids` under which prompts, the tokens before the first scored one, are equal as wholes or nowhere."""
        ids = self.tree_ids
        stop = self._prompt_length
        return own_ids(("prompt", ids[:stop]), stop) + ids[stop:]

    @classmethod
    def from_prompt_and_response(
        cls, prompt_ids: AbstractSequence[int], response_ids: AbstractSequence[int]
    ) -> Sequence:
        """Join a prompt and a response; exactly the response's tokens are scored."""
        return cls((*prompt_ids, *response_ids), (False,) * len(prompt_ids) + (True,) * len(response_ids))


@dataclass(frozen=True)
class Group:
    """The sequences that answer one prompt (2 for DPO, N for best-of-N), with what is known of their quality.

    Args:
        sequences: At least one `Sequence`.
        scores: One float per sequence, or None where unrated. Higher is better.
        labels: One flag per sequence: True for preferred (chosen), False for not (rejected).
        id: Where the group came from, used in error messages (``file:line``, say).
        columns: Extra columns of the data, by name. A list (or tuple) with one entry per sequence is theirs; anything
            else is the group's.
        ranks: In place of scores, where only an order is known: one number per sequence, 1 for the best, or None where
            unranked. The scores are then the negated ranks, which losses that need more than an order refuse.

    Raises:
        ValueError: If there are no sequences, scores, ranks or labels have another length, or both scores and ranks
            are given.
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

    def take(self, indices: AbstractSequence[int]) -> Group:
        """The group with only these sequences, in this order, and what belongs to them."""
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


def _neighbours(images: AbstractSequence[PlacedImage]) -> list[list[PlacedImage]]:
    """The images, with those that stand one right behind the other together."""
    found: list[list[PlacedImage]] = []
    for placed in images:
        if found and found[-1][-1].runs[-1][1] == placed.runs[0][0]:
            found[-1].append(placed)
        else:
            found.append([placed])
    return found

"""Layers that cross-attend to images (Mllama): each image's states once, and which of them a token sees.

A placeholder's row of features holds its embedding and then all states of its image, one after another. Tokens see the
last images before them. Those before the first image see all of it, padding too, and skip the layer's MLP, as in the
model's own forward.

Shape legend: B rows of T tokens, M images of S states each, followed by one state of zeros for tokens that see none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpref.models.running_pass import LayersPass, current_pass
from kvpref.ops.attention import AttentionParams, CascadePlan, VarlenBlock, cascade_attention
from kvpref.plan.batch import ImageInputs
from kvpref.plan.passes import PassPlan, RowRun
from kvpref.prefix.blocks import VarlenLayout
from kvpref.prefix.rules import CAUSAL
from kvpref.records.groups import Sequence as TokenSequence
from kvpref.records.images import Image
from kvpref.state.image_features import FeatureSource

Range = tuple[int, int]

_Kept = dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]
"""Per layer the keys and values of all states."""


class _Run(NamedTuple):
    """Tokens that see the same states: how many, which ranges of states, and whether an image comes before."""

    num_tokens: int
    seen: tuple[Range, ...]
    follows_image: bool


class CrossImages:
    """The inputs of cross-attention layers for the images of a batch or step.

    Args:
        model: The model.
        sequences: The sequences of the batch or step.
        inputs: The tower's inputs by image key.
        images: The images of the table of features, in order.
        keeps: Whether later passes attend to the first one's keys and values instead of recomputing them. Not
            possible if layers are recomputed, because they need their own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Sequence[TokenSequence],
        inputs: Mapping[str, ImageInputs],
        images: Sequence[Image],
        *,
        keeps: bool = False,
    ) -> None:
        self._kept: _Kept | None = {} if keeps else None
        self._num_images = len(images)
        self.hidden_size: int = model.config.get_text_config().hidden_size
        self._sequences, self._inputs = sequences, inputs
        keys = [placed.image.key for sequence in sequences for placed in sequence.images]
        # In modes that repeat prompts the table repeats images, sequence after sequence.
        is_repeated = len(images) == len(keys)
        number = {image.key: index for index, image in enumerate(images)}
        rows = iter(range(len(keys)) if is_repeated else [number[key] for key in keys])
        self._rows = [[next(rows) for _ in sequence.images] for sequence in sequences]

    def layer_inputs(self, item: PassPlan, features: FeatureSource) -> dict[str, Any]:
        """Keyword arguments for the stack of layers; empty if the pass's sequences have no images."""
        runs = item.row_runs or [(number, 0, item.input_ids.shape[1]) for number in range(len(self._sequences))]
        used = sorted({row for number, _, _ in runs for row in self._rows[number]})
        if not used:
            return {}
        if self._kept is not None:
            used = list(range(self._num_images))  # the same states in every pass
        device = item.input_ids.device
        wide = features.rows(0, torch.tensor(used, device=device))
        states = wide[:, self.hidden_size :].reshape(-1, self.hidden_size)
        nothing = len(states)
        states = torch.cat([states, states.new_zeros(1, self.hidden_size)])
        place = {row: index for index, row in enumerate(used)}
        rows = [list(self._runs(run, place, nothing // len(used), nothing)) for run in runs]
        if item.row_runs:
            return _of_a_pass([run for runs in rows for run in runs], states, self._kept)
        return _of_padded_rows(rows, states)

    def _runs(self, run: RowRun, place: Mapping[int, int], size: int, nothing: int) -> Iterator[_Run]:
        """The tokens of a run, cut where they begin to see other states."""
        number, first, stop = run
        sequence = self._sequences[number]
        starts = [size * place[row] for row in self._rows[number]]
        if not starts:
            yield _Run(stop - first, ((nothing, nothing + 1),), False)
            return
        places = [placed.runs[0][0] for placed in sequence.images]
        ends = _ends(places)
        cuts = [first, *(cut for cut in places if first < cut < stop), stop]
        for begin, end in pairwise(cuts):
            if begin < places[0]:
                yield _Run(end - begin, tuple((start, start + size) for start in starts), False)
                continue
            seen = [
                (start, start + self._num_real(placed.image, size))
                for start, at, until, placed in zip(starts, places, ends, sequence.images, strict=True)
                if at <= begin and (until is None or begin < until)
            ]
            yield _Run(end - begin, tuple(seen), True)

    def _num_real(self, image: Image, size: int) -> int:
        """The number of an image's states that belong to no padding tile; they come first."""
        tiles: Any = self._inputs[image.key]["aspect_ratio_mask"]
        return size // tiles.shape[-1] * int(tiles.sum())


def _ends(places: Sequence[int]) -> list[int | None]:
    """Where tokens stop seeing each image: at the next one; images that stand side by side are seen together."""
    ends: list[int | None] = [*places[1:], None]
    for index in reversed(range(len(places) - 1)):
        if places[index + 1] == places[index] + 1:
            ends[index] = ends[index + 1]
    return ends


def own_mask(sequence: TokenSequence, inputs: Sequence[ImageInputs]) -> torch.Tensor:
    """(1, T, images, tiles) int64, the mask for the model's own forward: 1 where a token sees a tile."""
    tiles: list[Any] = [image["aspect_ratio_mask"] for image in inputs]
    mask = torch.zeros(1, len(sequence), len(tiles), tiles[0].shape[-1], dtype=torch.int64)
    places = [placed.runs[0][0] for placed in sequence.images]
    for number, (place, end) in enumerate(zip(places, _ends(places), strict=True)):
        mask[0, place:end, number, : int(tiles[number].sum())] = 1
    return mask


class _CrossPass(LayersPass):
    """What cross-attention layers get in place of a mask: the blocks of their queries over states of images."""

    def __init__(self, blocks: tuple[VarlenBlock, ...], kept: _Kept | None) -> None:
        running = current_pass()
        assert running is not None
        super().__init__(running, CAUSAL)
        self._blocks, self._kept = blocks, kept

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        params: AttentionParams,
        sink: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Like `LayersPass.attend`, with the keys and values of the states."""
        plan = CascadePlan(blocks=self._blocks, params=params, backend=self.running.backend)
        states = key.contiguous(), value.contiguous()
        if self._kept is not None:
            states = self._kept.setdefault(module, states)
        return cascade_attention(query, *states, (), plan, sink)


def _of_a_pass(runs: Sequence[_Run], states: torch.Tensor, kept: _Kept | None) -> dict[str, Any]:
    """One block per range that a token may see."""
    offsets = tuple(accumulate((run.num_tokens for run in runs), initial=0))
    blocks = []
    for number in range(max(len(run.seen) for run in runs)):
        ranges = [run.seen[number] if number < len(run.seen) else (0, 0) for run in runs]
        layout = VarlenLayout(
            cu_seqlens_q=offsets,
            cu_seqlens_k=tuple(accumulate((stop - first for first, stop in ranges), initial=0)),
            key_starts=tuple(first for first, _ in ranges),
            shape="rectangle",
        )
        blocks.append(VarlenBlock.from_layout(layout, states.device))
    return {
        "cross_attention_states": states.unsqueeze(0),
        "cross_attention_mask": _CrossPass(tuple(blocks), kept),
        "full_text_row_masked_out_mask": _follows_image([runs], states),
    }


def _of_padded_rows(rows: Sequence[Sequence[_Run]], states: torch.Tensor) -> dict[str, Any]:
    """Arguments in which every row sees all states, under a mask; the states are shared by all rows, not copied."""
    masks = []
    for runs in rows:
        pieces = []
        for run in runs:
            seen = torch.full((len(states),), torch.finfo(states.dtype).min, dtype=states.dtype)
            for first, stop in run.seen:
                seen[first:stop] = 0
            pieces.append(seen.expand(run.num_tokens, -1))
        masks.append(torch.cat(pieces))
    return {
        "cross_attention_states": states.expand(len(rows), -1, -1),
        "cross_attention_mask": torch.stack(masks).unsqueeze(1).to(states.device),
        "full_text_row_masked_out_mask": _follows_image(rows, states),
    }


def _follows_image(rows: Sequence[Sequence[_Run]], states: torch.Tensor) -> torch.Tensor:
    """(B, 1, T, 1), 1 for tokens after an image."""
    flags = [[float(run.follows_image) for run in runs for _ in range(run.num_tokens)] for runs in rows]
    return torch.tensor(flags, dtype=states.dtype)[:, None, :, None].to(states.device)

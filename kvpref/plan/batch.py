"""`Batch`, a collated micro-batch of groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch

from kvpref.plan.columns import column_values, sequence_numbers, token_numbers
from kvpref.plan.modes import build_plan
from kvpref.plan.passes import ModePlan, Reads
from kvpref.prefix.tree import PrefixTree, build_tree
from kvpref.records.groups import Group, Sequence
from kvpref.records.host_copies import to_device
from kvpref.records.images import unique_images
from kvpref.records.tensor_fields import map_tensors, tensors_to

T = TypeVar("T")

ImageInputs = Mapping[str, Any]
"""What a vision tower is given of one image, by name: tensors, and what else its processor makes."""

DEFAULT_MIN_SHARED_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Which shared runs of tokens become segments of their own."""

    min_shared_tokens: int = DEFAULT_MIN_SHARED_TOKENS
    """Shorter runs are repeated."""

    max_depth: int | None = None
    """Deepest segment; 1 allows prompts and responses, None any depth."""

    whole_prompts: bool = False
    """Share prompts as wholes or not at all, for models in which a prompt's tokens all see one another."""

    def tree(self, sequences: AbstractSequence[Sequence]) -> PrefixTree:
        """The prefix tree of some sequences."""
        return build_tree(
            [sequence.input_ids for sequence in sequences],
            min_shared_tokens=self.min_shared_tokens,
            max_depth=self.max_depth,
            keys=[sequence.whole_prompt_ids if self.whole_prompts else sequence.tree_ids for sequence in sequences],
        )


class Batch:
    """A micro-batch: groups, their prefix tree, and the tensors of each mode, built when first asked for.

    Attributes:
        groups: As given.
        sequences: All sequences, group after group.
        tree: The prefix tree over all sequences, across groups too.
        sharing: What the tree was built with.
        group_index: (num_sequences,) int64, on `device`.
        cu_seqlens: (num_sequences + 1,) int64, on `device`: offsets of each sequence's scored tokens, in every mode.
        reads: Which hidden states its plans read.
        images: Those of all sequences, each once, in order of first appearance.
        device: Where the plans' tensors are.
    """

    def __init__(
        self,
        groups: AbstractSequence[Group],
        tree: PrefixTree,
        device: torch.device | str = "cpu",
        sharing: Sharing | None = None,
        reads: Reads | None = None,
    ) -> None:
        self.reads = Reads() if reads is None else reads
        self.groups = tuple(groups)
        self.sequences: tuple[Sequence, ...] = tuple(s for group in self.groups for s in group.sequences)
        self.tree = tree
        self.images = unique_images(placed.image for sequence in self.sequences for placed in sequence.images)
        self.sharing = Sharing() if sharing is None else sharing
        self.device = torch.device(device)
        sizes = [len(group) for group in self.groups]
        group_index = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        num_scored = [sum(sequence.scored) for sequence in self.sequences]
        cu_seqlens = torch.tensor([0, *accumulate(num_scored)])
        self.group_index, self.cu_seqlens = to_device(group_index, self.device), to_device(cu_seqlens, self.device)
        self._plans: dict[str, ModePlan] = {}
        self._made: list[tuple[tuple[Any, ...], Any]] = []
        self._image_inputs: dict[str, ImageInputs] = {}
        self._other: Batch | None = None

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    @property
    def num_sequences(self) -> int:
        return len(self.sequences)

    @property
    def num_total_tokens(self) -> int:
        """Tokens of all sequences, shared prompts counted once per sequence."""
        return sum(map(len, self.sequences))

    @property
    def num_unique_tokens(self) -> int:
        """Tokens that are stored and computed in mode ``two_pass``."""
        return self.tree.num_unique_tokens

    @property
    def num_scored_tokens(self) -> int:
        """Scored tokens of all sequences, shared ones counted once per sequence."""
        return sum(sum(sequence.scored) for sequence in self.sequences)

    def tensors(self, build: Callable[..., T], *args: Any) -> T:
        """What ``build(groups, *args)`` makes, on `device`; built once for the same function and equal arguments.

        This is how a loss gets at what it reads of a batch besides log-probs: asked for while the batch is collated
        (`PreferenceLoss.prepare_batch`), it is on the device when the loss asks again.

        Args:
            build: A function of a module, because batches travel between processes, that reads nothing but its
                arguments and returns a tensor, or a tuple or dataclass of tensors, on the CPU.
            *args: Further arguments.

        Raises:
            As `build`.
        """
        asked = (build, *args)
        for known, made in self._made:
            if known == asked:
                return made  # type: ignore[no-any-return]
        made = tensors_to(build(self.groups, *args), self.device)
        self._made.append((asked, made))
        return made

    def image_inputs(self, known: Mapping[str, ImageInputs] | None = None) -> Mapping[str, ImageInputs]:
        """By image key, its tower's inputs, which stay in host memory; read when first asked for.

        Args:
            known: Some that were read for other batches.

        Raises:
            As `Image.read`.
        """
        for image in self.images:
            if image.key not in self._image_inputs:
                self._image_inputs[image.key] = (known or {}).get(image.key) or dict(image.read())
        return self._image_inputs

    def column(self, name: str) -> list[Any]:
        """An extra column of the data: the value of each group.

        Raises:
            InputError: If a group has no such column; the message names it.
        """
        return column_values(self.groups, name)

    def sequence_column(self, name: str) -> torch.Tensor:
        """An extra column of numbers, (num_sequences,) float32 on `device`; a group's single number is each sequence's.

        Raises:
            InputError: If a group has no such column, or it holds something else than one number per sequence.
        """
        # A copy: a user's loss may change it in place.
        return self.tensors(sequence_numbers, name).clone()

    def token_column(self, name: str) -> torch.Tensor:
        """An extra column of one number per scored token, (num_scored_tokens,) float32 on `device`.

        Raises:
            InputError: If a group has no such column, or a response's list has another length than its scored tokens.
        """
        return self.tensors(token_numbers, name).clone()

    def plan(self, mode: str) -> ModePlan:
        """The passes of `mode` over this batch, on `device`; built once.

        Raises:
            ValueError: If there is no such mode.
        """
        if mode not in self._plans:
            # Also where scored in inference mode first, whose tensors no later backward pass may read.
            with torch.inference_mode(False):
                plan = build_plan(mode, self.sequences, self.tree, self.reads)
                self._plans[mode] = tensors_to(plan, self.device)
        return self._plans[mode]

    def reading(self, reads: Reads) -> Batch:
        """This batch, or one of the same groups whose plans read other hidden states."""
        if reads == self.reads:
            return self
        if self._other is None or self._other.reads != reads:
            sharing, tree = self.sharing, self.tree
            if reads.spans == "prompts" and not sharing.whole_prompts:
                sharing = replace(sharing, whole_prompts=True)
                tree = sharing.tree(self.sequences)
            self._other = Batch(self.groups, tree, self.device, sharing, reads)
            self._other._made, self._other._image_inputs = self._made, self._image_inputs
        return self._other

    def to(self, device: torch.device | str) -> Batch:
        """This batch with all tensors built so far, of plans and for losses, on `device`."""
        if torch.device(device) == self.device:
            return self
        target = torch.device(device)
        return self._mapped(lambda tensor: to_device(tensor, target), target)

    def pin_memory(self, images: dict[str, ImageInputs] | None = None) -> Batch:
        """This batch with all tensors in page-locked memory, from which `to` copies to CUDA without a copy before.

        Args:
            images: By key, inputs that are there already; those of this batch are added.
        """
        pinned = self._mapped(torch.Tensor.pin_memory, self.device)
        images = {} if images is None else images
        for key, inputs in self._image_inputs.items():
            if key not in images:
                images[key] = _pinned(inputs)
        pinned._image_inputs = {key: images[key] for key in self._image_inputs}
        return pinned

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> Batch:
        mapped = copy(self)
        mapped.device, mapped._other = device, None
        mapped.group_index, mapped.cu_seqlens = function(self.group_index), function(self.cu_seqlens)
        mapped._plans = {mode: map_tensors(plan, function) for mode, plan in self._plans.items()}
        mapped._made = [(asked, map_tensors(made, function)) for asked, made in self._made]
        return mapped


def _pinned(inputs: ImageInputs) -> ImageInputs:
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def collate(
    groups: AbstractSequence[Group],
    *,
    device: torch.device | str = "cpu",
    modes: AbstractSequence[str] = (),
    min_shared_tokens: int = DEFAULT_MIN_SHARED_TOKENS,
    max_depth: int | None = None,
    whole_prompts: bool = False,
    reads: Reads | None = None,
) -> Batch:
    """Collate groups into one micro-batch.

    Args:
        groups: At least one.
        device: Where tensors go.
        modes: Plans to build now (in a data worker, say) instead of at first use.
        min_shared_tokens: Shared runs shorter than this are repeated rather than given a segment of their own.
        max_depth: Deepest segment of the prefix tree; 1 allows prompts and responses, None any depth.
        whole_prompts: Share prompts as wholes or not at all, for models in which a prompt's tokens all see one another;
            a batch that was collated without is collated again where its model is one.
        reads: Which hidden states its plans read; those for log-probs if None.

    Raises:
        ValueError: If there are no groups, or a limit or mode is out of range.
    """
    if not groups:
        raise ValueError("collate needs at least one group; got none")
    sequences = [sequence for group in groups for sequence in group.sequences]
    whole_prompts = whole_prompts or (reads is not None and reads.spans == "prompts")
    sharing = Sharing(min_shared_tokens=min_shared_tokens, max_depth=max_depth, whole_prompts=whole_prompts)
    batch = Batch(groups, sharing.tree(sequences), device, sharing, reads)
    for mode in modes:
        batch.plan(mode)
    return batch

"""`Batch`, a collated micro-batch of groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from copy import copy
from itertools import accumulate
from typing import Any, TypeVar

import torch

from kvpref.plan.columns import column_values, sequence_numbers, token_numbers, token_weights
from kvpref.plan.modes import build_plan
from kvpref.plan.passes import ModePlan, Reads
from kvpref.plan.sharing import DEFAULT_MIN_SHARED_TOKENS, Sharing
from kvpref.prefix.tree import PrefixTree
from kvpref.records.groups import Group, Sequence
from kvpref.records.host_copies import to_device
from kvpref.records.images import unique_images
from kvpref.records.tensor_fields import map_tensors, tensors_to

T = TypeVar("T")

ImageInputs = Mapping[str, Any]
"""The inputs of a vision tower for one image, by name: tensors and whatever else its processor returns."""


class Batch:
    """A micro-batch: groups, their prefix tree, and the tensors of each mode, built when first asked for.

    Attributes:
        groups: The groups, as passed in.
        sequences: All sequences, group after group.
        parts: What is run: the parts of all sequences in order; only their last parts where ends are read.
        sharing: The settings that the tree is built with.
        group_index: (num_sequences,) int64, on `device`.
        cu_seqlens: (num_sequences + 1,) int64, on `device`: offsets of each sequence's scored tokens, in every mode.
        reads: Which hidden states its plans read.
        images: The images of all sequences, each once, in order of first appearance.
        device: Where the plans' tensors are.
    """

    def __init__(
        self,
        groups: AbstractSequence[Group],
        device: torch.device | str = "cpu",
        sharing: Sharing | None = None,
        reads: Reads | None = None,
        tree: PrefixTree | None = None,
    ) -> None:
        self.reads = Reads() if reads is None else reads
        self.groups = tuple(groups)
        self.sequences: tuple[Sequence, ...] = tuple(s for group in self.groups for s in group.sequences)
        self.parts = _parts_read(self.groups, self.reads)
        self._tree = tree
        self.images = unique_images(placed.image for part in self.parts for placed in part.images)
        self.sharing = Sharing() if sharing is None else sharing
        self.device = torch.device(device)
        sizes = [len(group) for group in self.groups]
        group_index = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        num_scored = [sequence.total_scored for sequence in self.sequences]
        cu_seqlens = torch.tensor([0, *accumulate(num_scored)])
        self.group_index, self.cu_seqlens = to_device(group_index, self.device), to_device(cu_seqlens, self.device)
        self._plans: dict[str, ModePlan] = {}
        self._made: list[tuple[tuple[Any, ...], Any]] = []
        self._image_inputs: dict[str, ImageInputs] = {}
        self._other: Batch | None = None

    @property
    def tree(self) -> PrefixTree:
        """The prefix tree over all parts, across groups too; built when first asked for."""
        if self._tree is None:
            self._tree = self.sharing.tree(self.parts)
        return self._tree

    @property
    def num_groups(self) -> int:
        """Groups of the micro-batch."""
        return len(self.groups)

    @property
    def num_sequences(self) -> int:
        """Sequences of all groups together."""
        return len(self.sequences)

    @property
    def num_total_tokens(self) -> int:
        """Tokens of all parts, shared prompts counted once per part."""
        return sum(map(len, self.parts))

    @property
    def num_unique_tokens(self) -> int:
        """Tokens stored and computed in mode ``two_pass``."""
        return self.tree.num_unique_tokens

    @property
    def num_scored_tokens(self) -> int:
        """Scored tokens of all sequences; shared ones count once per sequence."""
        return sum(part.num_scored for part in self.parts)

    def tensors(self, build: Callable[..., T], *args: Any) -> T:
        """The result of ``build(groups, *args)``, on `device`; built once per function and equal arguments.

        This is how a loss gets what it needs from a batch besides log-probs: requested while the batch is collated
        (`PreferenceLoss.prepare_batch`), the tensors are on the device when the loss asks again.

        Args:
            build: A module-level function, because batches travel between processes. It reads nothing but its
                arguments and returns a tensor, or a tuple or dataclass of tensors, on the CPU.
            *args: Further arguments.

        Raises:
            Exception: Whatever `build` raises.
        """
        asked = (build, *args)
        for known, made in self._made:
            if known == asked:
                return made  # type: ignore[no-any-return]
        made = tensors_to(build(self.groups, *args), self.device)
        self._made.append((asked, made))
        return made

    def image_inputs(self, known: Mapping[str, ImageInputs] | None = None) -> Mapping[str, ImageInputs]:
        """The tower's inputs by image key. They stay in host memory and are read when first asked for.

        Args:
            known: Inputs already read for other batches.

        Raises:
            InputError: If an image cannot be read; see `Image.read`.
        """
        for image in self.images:
            if image.key not in self._image_inputs:
                self._image_inputs[image.key] = (known or {}).get(image.key) or dict(image.read())
        return self._image_inputs

    def column(self, name: str) -> list[Any]:
        """An extra column of the data, one value per group.

        Raises:
            InputError: If a group has no such column; the message names it.
        """
        return column_values(self.groups, name)

    def sequence_column(self, name: str) -> torch.Tensor:
        """An extra numeric column, (num_sequences,) float32 on `device`; a group's single number goes to each sequence.

        Raises:
            InputError: If a group has no such column, or it does not hold one number per sequence.
        """
        # A copy: a user's loss may change it in place.
        return self.tensors(sequence_numbers, name).clone()

    def token_column(self, name: str) -> torch.Tensor:
        """An extra column with one number per scored token, (num_scored_tokens,) float32 on `device`.

        Raises:
            InputError: If a group has no such column, or a response's list is not as long as its scored tokens.
        """
        return self.tensors(token_numbers, name).clone()

    def token_weights(self, dtype: torch.dtype) -> torch.Tensor | None:
        """`Sequence.weights` of all scored tokens, (num_scored_tokens,) on `device`; None if no sequence has any."""
        if all(part.weights is None for part in self.parts):
            return None
        return self.tensors(token_weights).to(dtype)

    def plan(self, mode: str) -> ModePlan:
        """The passes of `mode` over this batch, on `device`; built once.

        Raises:
            ValueError: If there is no such mode.
        """
        if mode not in self._plans:
            # Inference mode's tensors may not be read by a later backward pass.
            with torch.inference_mode(False):
                plan = build_plan(mode, self.parts, self.tree, self.reads)
                self._plans[mode] = plan if self.device.type == "cpu" else tensors_to(plan, self.device)
        return self._plans[mode]

    def reading(self, reads: Reads) -> Batch:
        """This batch, or one of the same groups whose plans read other hidden states."""
        if reads == self.reads:
            return self
        if self._other is None or self._other.reads != reads:
            sharing, parts = self.sharing.under(reads), _parts_read(self.groups, reads)
            is_same = sharing == self.sharing and len(parts) == len(self.parts)
            self._other = Batch(self.groups, self.device, sharing, reads, self._tree if is_same else None)
            self._other._made, self._other._image_inputs = self._made, self._image_inputs
        return self._other

    def to(self, device: torch.device | str) -> Batch:
        """This batch with all tensors built so far, for plans and losses, on `device`."""
        if torch.device(device) == self.device:
            return self
        target = torch.device(device)
        return self._mapped(lambda tensor: to_device(tensor, target), target)

    def pin_memory(self, images: dict[str, ImageInputs] | None = None) -> Batch:
        """This batch with all tensors in page-locked memory, from which `to` copies straight to CUDA.

        Args:
            images: Inputs already pinned, by key; this batch's are added.
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


def _parts_read(groups: AbstractSequence[Group], reads: Reads) -> tuple[Sequence, ...]:
    """The token rows to run. A reward is read at the end of a response, so earlier parts are left out."""
    if reads.kind == "ends":
        return tuple(sequence for group in groups for sequence in group.sequences)
    return tuple(part for group in groups for part in group.parts)


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
    pass_tokens: int = 0,
    reads: Reads | None = None,
) -> Batch:
    """Collate groups into one micro-batch.

    Args:
        groups: At least one.
        device: Where tensors go.
        modes: Plans to build now, for example in a data worker, instead of at first use.
        min_shared_tokens: Shared runs shorter than this are repeated rather than given a segment of their own.
        max_depth: Deepest segment of the prefix tree; 1 allows prompts and responses, None any depth.
        whole_prompts: Share prompts as wholes or not at all, for models whose prompt tokens all see one another;
            a batch collated without it is collated again for such a model.
        pass_tokens: Tokens that each pass beyond the second has to save.
        reads: Which hidden states its plans read; None for those that give log-probs.

    Raises:
        ValueError: If there are no groups, or a limit or mode is out of range.
    """
    if not groups:
        raise ValueError("collate needs at least one group; got none")
    sharing = Sharing(
        min_shared_tokens=min_shared_tokens, max_depth=max_depth, whole_prompts=whole_prompts, pass_tokens=pass_tokens
    ).under(reads or Reads())
    batch = Batch(groups, device, sharing, reads)
    for mode in modes:
        batch.plan(mode)
    batch.token_weights(torch.float64)  # built ahead of use, like the plans
    return batch

"""The mixers of one pass: the states each starts from, and those it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from kvpref.errors import UnsupportedModelError
from kvpref.models.mixers.call import MixerCall
from kvpref.ops.recurrent import SegmentRows
from kvpref.prefix.segments import SegmentLayout
from kvpref.state.recurrent import States


class PassMixers:
    """Gives mixers their initial states and collects their final ones, also when a checkpoint reruns them.

    Args:
        segments: Per level of the pass's row, its segments.
        before: The states that the mixers of earlier passes left.
    """

    def __init__(self, segments: Sequence[SegmentLayout], before: Mapping[nn.Module, States]) -> None:
        self._segments, self._before = segments, before
        self._levels: list[SegmentRows] | None = None
        self._left: dict[nn.Module, States] | None = {}
        self._modules: list[nn.Module] = []

    def call(self, module: nn.Module, device: torch.device) -> MixerCall:
        """The states of the mixer that runs now.

        Raises:
            UnsupportedModelError: If the pass does not know its segments, or the mixer took no part in earlier passes.
        """
        if not self._segments:
            raise UnsupportedModelError(
                f"{type(module).__name__} carries a state from token to token, which this way of sharing prefixes does "
                "not carry over; use kvpref.response_logps or kvpref.forward_backward"
            )
        if self._levels is None:
            # May run in inference mode, whose tensors no backward pass may read, or on fake tensors.
            with torch.inference_mode(False), unset_fake_temporarily():
                self._levels = [SegmentRows(layout, device) for layout in self._segments]
        before = self._before.get(module, ())
        if not before and not self._levels[0].begins_with_zeros:
            raise UnsupportedModelError(
                f"{type(module).__name__} took no part in earlier passes; this model runs its layers in a way "
                "kvpref does not follow"
            )
        return MixerCall(self._levels, before)

    def leave(self, module: nn.Module, call: MixerCall) -> None:
        """Store the states that a mixer leaves, unless a checkpoint is rerunning it.

        Raises:
            UnsupportedModelError: If it has already run in this pass.
        """
        if self._left is None:
            return
        if module in self._left:
            raise UnsupportedModelError(
                f"{type(module).__name__} runs more than once in a forward pass; kvpref carries over one state"
            )
        self._left[module] = tuple(call.left)
        self._modules.append(module)

    def finish(self) -> tuple[list[nn.Module], dict[nn.Module, States]]:
        """Close the pass and return the mixers that ran and the states they leave."""
        left, self._left = self._left, None
        assert left is not None
        return self._modules, {module: states for module, states in left.items() if states}

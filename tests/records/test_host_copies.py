"""Copies to CUDA come from page-locked memory; a stand-in shows which tensor is copied, and how."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvpref.records.host_copies import to_device
from kvpref.records.outputs import ResponseRewards
from kvpref.records.tensor_fields import map_tensors


@pytest.mark.parametrize("is_initialized", [True, False])
def test_copies_to_cuda_come_from_page_locked_memory(is_initialized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.arange(3)
    pinned = made.clone()
    copies: list[tuple[int, Any, bool]] = []

    def to(tensor: torch.Tensor, device: Any, non_blocking: bool = False) -> torch.Tensor:
        copies.append((tensor.data_ptr(), device, non_blocking))
        return tensor

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_initialized)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned)
    monkeypatch.setattr(torch.Tensor, "to", to)
    to_device(made, torch.device("cuda"))
    assert copies == [((pinned if is_initialized else made).data_ptr(), torch.device("cuda"), True)]


def test_elsewhere_nothing_is_copied_before() -> None:
    made = torch.arange(3)
    assert to_device(made, torch.device("cpu")) is made
    assert to_device(made, torch.device("meta")).device.type == "meta"


def test_tuples_of_tensors_stay_what_they_are() -> None:

    found = map_tensors((torch.ones(1), ResponseRewards(torch.ones(1), torch.zeros(1)), 3), torch.neg)
    assert isinstance(found[1], ResponseRewards)
    assert (found[0].item(), found[1].rewards.item(), found[2]) == (-1, -1, 3)
    assert map_tensors(torch.ones(1), torch.neg).item() == -1
    with pytest.raises(TypeError, match="a tensor or a tuple of them; got dict"):
        map_tensors({}, torch.neg)

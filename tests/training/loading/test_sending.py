"""Steps made in data workers: the same as a thread makes, in few buffers, with errors in their own words."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from preference_runs import make_args, make_groups, make_model
from torch.utils.data import DataLoader
from vision_models import VisionPrompt, picture, vision_groups

import kvpref
from kvpref.data import PreferenceDataset
from kvpref.training import defaults
from kvpref.training.loading.batcher import make_batcher
from kvpref.training.loading.collation import StepDataset
from kvpref.training.loading.inputs import MicroBatchInputs, StepInputs
from kvpref.training.loading.loader import make_loader
from kvpref.training.loading.sending import PackedStep, SentStep

BOUNDED = {"schedule": "bounded", "max_tokens_per_chunk": 16}


def loader_of(
    folder: Path, num_workers: int, groups: list[kvpref.Group] | None = None, **settings: Any
) -> DataLoader[Any]:
    args = make_args(str(folder), dataloader_num_workers=num_workers, **settings)
    dataset = PreferenceDataset(make_groups(20) if groups is None else groups)
    batcher = make_batcher(dataset, args, groups_per_device=3, shuffle=True)
    return make_loader(dataset, batcher, args, loss=args.make_loss())


def assert_same(one: StepInputs, other: StepInputs) -> None:
    """All tensors and arrays, in the order of the objects that hold them, and who is in which micro-batch."""
    packed = PackedStep.pack(one), PackedStep.pack(other)
    assert packed[0].places == packed[1].places
    assert packed[0].ends == packed[1].ends
    assert torch.equal(packed[0].tensors, packed[1].tensors)
    assert torch.equal(packed[0].arrays, packed[1].arrays)
    for mine, theirs in zip(one, other, strict=True):
        assert (mine.group_indices, mine.is_filler) == (theirs.group_indices, theirs.is_filler)
        assert mine.batch.groups == theirs.batch.groups
        assert mine.batch.sharing == theirs.batch.sharing


def turns(group: kvpref.Group) -> kvpref.Group:
    """With a response in two parts, weights and columns."""
    first, second = group.sequences
    joined = kvpref.Sequence(second.ids, second.flags, weights=[0.5] * second.num_scored, earlier=[first])
    return kvpref.Group([joined, first], scores=[1.0, 0.0], id=group.id, columns={"note": "text", "weight": [1.0, 2.0]})


@pytest.mark.parametrize("settings", [{}, BOUNDED], ids=["full", "bounded"])
def test_workers_make_the_steps_that_the_thread_makes(tmp_path: Path, settings: dict[str, Any]) -> None:
    steps = [list(loader_of(tmp_path, workers, **settings)) for workers in (0, 1, 2)]
    for own in steps[1:]:
        assert len(own) == len(steps[0]) == 7
        for one, other in zip(steps[0], own, strict=True):
            assert_same(one, other)


def test_what_groups_hold_besides_tokens_arrives(tmp_path: Path) -> None:
    groups = [turns(group) for group in make_groups(4)]
    made = StepInputs(
        micro_batches=(MicroBatchInputs(batch=kvpref.collate(groups), group_indices=(0, 1, 2, 3), is_filler=False),)
    )
    (item,) = PackedStep.pack(made).unpack()
    assert item.batch.groups == tuple(groups)
    assert item.batch.column("note") == ["text"] * 4
    # Views into what was received, which no one may write to.
    assert not item.batch.parts[0].ids.flags.owndata
    assert not item.batch.parts[0].ids.flags.writeable


def test_pixels_arrive_once() -> None:
    prompts = [VisionPrompt(text, (picture(1),), ("Red", "Blue.")) for text in ("What?", "Which?")]
    batches = [kvpref.collate([group]) for group in vision_groups("llava", prompts).groups]
    known: dict[str, Any] = {}
    for batch in batches:
        known.update(batch.image_inputs(known))
    made = StepInputs(
        micro_batches=tuple(
            MicroBatchInputs(batch=batch, group_indices=(index,), is_filler=False)
            for index, batch in enumerate(batches)
        )
    )
    sent = PackedStep.pack(made)
    (image,) = batches[0].images
    found = [item.batch.image_inputs()[image.key]["pixel_values"] for item in sent.unpack()]
    assert found[0] is found[1]
    assert torch.equal(found[0], known[image.key]["pixel_values"])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0, 3),
        torch.tensor(True),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.arange(12).reshape(3, 4).T,
        torch.arange(3, dtype=torch.int8),
        torch.ones(1, dtype=torch.int64).as_strided((1,), (0,)),
    ],
    ids=lambda tensor: f"{tensor.dtype}, {tuple(tensor.shape)}",
)
def test_every_kind_of_tensor_arrives(tensor: torch.Tensor) -> None:
    batch = kvpref.collate(make_groups(1))
    batch._made.append(((len, 1), (tensor, tensor)))
    made = StepInputs(micro_batches=(MicroBatchInputs(batch=batch, group_indices=(0,), is_filler=False),))
    (item,) = PackedStep.pack(made).unpack()
    (_, (first, second)) = item.batch._made[-1]
    assert first is second
    assert (first.dtype, first.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(first, tensor)


def test_the_receiver_pins_one_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1])
    made = next(iter(loader_of(tmp_path, 0, **BOUNDED)))
    received = pickle.loads(pickle.dumps(SentStep(made, pins=True)))
    assert isinstance(received, PackedStep)
    assert_same(received.pin_memory(), made)
    assert len(pinned) == 1
    assert isinstance(pickle.loads(pickle.dumps(SentStep(made, pins=False))), StepInputs)


def test_plans_are_sent_in_two_buffers(tmp_path: Path) -> None:
    """Of the message little grows with the tokens."""
    short, long = (
        kvpref.Group([kvpref.Sequence.from_prompt_and_response(range(1, 21), [5] * length) for length in (3, 3 + size)])
        for size in (40, 4000)
    )
    sizes = []
    for group in (short, long):
        batch = kvpref.collate([group], modes=["two_pass"])
        made = StepInputs(micro_batches=(MicroBatchInputs(batch=batch, group_indices=(0,), is_filler=False),))
        packed = PackedStep.pack(made)
        sizes.append((len(packed.message), packed.num_bytes))
    assert sizes[1][1] > sizes[0][1] + 8 * 4000
    assert sizes[1][0] < sizes[0][0] + 2 * 4000


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_input_in_a_worker_is_told_in_its_own_words_and_at_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    loader = loader_of(tmp_path, num_workers)
    bad = list(loader.batch_sampler)[3][0]  # type: ignore[arg-type, call-overload]
    original = StepDataset.__getitem__

    def fail(self: StepDataset, micro_batch: Any) -> MicroBatchInputs:
        if micro_batch == bad:
            raise kvpref.InputError("made:4: no such image")
        return original(self, micro_batch)

    monkeypatch.setattr(StepDataset, "__getitem__", fail)
    iterator = iter(loader)
    for _ in range(3):
        assert list(next(iterator))
    with pytest.raises(kvpref.InputError) as found:
        list(next(iterator))
    assert str(found.value) == "made:4: no such image"


def test_interrupts_are_left_to_the_process_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, trainer = StepDataset.__getitem__, os.getpid()

    def interrupted(self: StepDataset, micro_batch: Any) -> MicroBatchInputs:
        assert os.getpid() != trainer
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, micro_batch)

    monkeypatch.setattr(StepDataset, "__getitem__", interrupted)
    assert len([list(step) for step in loader_of(tmp_path, 1)]) == 7


def test_skipping_on_resume_is_exact(tmp_path: Path) -> None:
    Accelerator(cpu=True)
    expected = list(loader_of(tmp_path, 0))[4:]
    found = list(skip_first_batches(loader_of(tmp_path, 1), 4))
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("settings", [{}, BOUNDED], ids=["full", "bounded"])
def test_training_ends_with_the_same_weights(tmp_path: Path, settings: dict[str, Any]) -> None:
    weights = []
    for num_workers in (0, 1):
        model = make_model()
        args = make_args(str(tmp_path), loss="sft", max_steps=3, dataloader_num_workers=num_workers, **settings)
        kvpref.PreferenceTrainer(model=model, args=args, train_dataset=make_groups(9)).train()
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *weights))


# The default


@pytest.mark.parametrize(
    ("method", "free_bytes", "expected"), [("fork", 2**30, 1), ("fork", 2**26, 0), ("spawn", 2**30, 0)]
)
def test_a_gpu_gets_a_worker_where_one_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, free_bytes: int, expected: int
) -> None:
    monkeypatch.setattr(defaults, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes))
    monkeypatch.setattr(defaults.multiprocessing, "get_start_method", lambda: method)
    assert defaults.default_workers(on_cpu=False) == expected
    assert defaults.default_workers(on_cpu=True) == 0
    monkeypatch.setattr(defaults, "SHARED_MEMORY", tmp_path / "none")
    assert defaults.default_workers(on_cpu=False) == 0


def test_the_number_that_was_given_stays(tmp_path: Path) -> None:
    assert make_args(str(tmp_path)).dataloader_num_workers == 0  # on the CPU
    assert make_args(str(tmp_path), dataloader_num_workers=3).dataloader_num_workers == 3

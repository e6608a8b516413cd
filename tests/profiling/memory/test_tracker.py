"""The tracker on steps whose bytes are known, and beside PyTorch's allocator on a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from sample_groups import tokens
from tiny_models import tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kvpref
from kvpref.profiling.memory.peak import peak_bytes
from kvpref.profiling.memory.tracker import OUTSIDE, MemoryTracker, category_of_region
from kvpref.profiling.steps import TrainStep, make_micro_batches
from kvpref.tracing import mark, region

KIB = 1024
CPU = torch.device("cpu")


def block(num_kib: int) -> torch.Tensor:
    return torch.empty(num_kib * KIB, dtype=torch.uint8)


@contextmanager
def tracking(model: nn.Module | None = None, **settings: bool) -> Iterator[MemoryTracker]:
    with MemoryTracker(model or nn.Module(), **settings) as tracker:
        yield tracker


def test_views_and_results_in_place_count_once() -> None:
    with tracking() as tracker:
        whole = block(4)
        parts = [whole[:KIB], whole.view(2, -1), whole.add_(1), *whole.split(KIB)]
        assert tracker.current.total_bytes == 4 * KIB
        del whole
        assert tracker.current.total_bytes == 4 * KIB  # the views keep it
        del parts
        assert tracker.current.total_bytes == 0
    assert tracker.peak.total_bytes == 4 * KIB


def test_the_peak_is_what_was_alive_at_once() -> None:
    with tracking() as tracker:
        with region("pass 0"):
            first = block(3)
        with region("lm head"):
            second = block(4)
        del first
        third = block(2)
        del second, third
    assert tracker.peak.total_bytes == 7 * KIB
    assert tracker.peak.bytes_by_category == {"activations pass 0": 3 * KIB, "log-probs": 4 * KIB}
    assert tracker.peak.region == "lm head"
    by_region = {name: snapshot.total_bytes for name, snapshot in tracker.peak_by_region.items()}
    assert by_region == {"pass 0": 3 * KIB, "lm head": 7 * KIB, OUTSIDE: 6 * KIB}
    assert tracker.current.bytes_by_category == {}


def test_a_tensor_from_before_is_resident_from_its_first_use() -> None:
    before = block(5)
    with tracking() as tracker:
        assert tracker.current.total_bytes == 0
        with region("pass 0"):
            view = before[:2]
        assert tracker.current.bytes_by_category == {"other": 5 * KIB}
        del view, before
        assert tracker.current.total_bytes == 0


def test_a_storage_that_is_resized_has_its_new_size() -> None:
    with tracking() as tracker:
        tensor = block(1)
        tensor.resize_(6 * KIB)
        assert tracker.current.total_bytes == 6 * KIB


def test_lists_of_results_are_counted() -> None:
    with tracking() as tracker:
        parts = torch._foreach_add([block(1), block(2)], 1)
        assert tracker.current.total_bytes == 3 * KIB
        del parts


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_a_training_step(fake: bool) -> None:
    """Linear without bias: 8 inputs, 16 outputs, 32 rows, fp32; the most is held when the weight's gradient is made."""
    with FakeTensorMode() if fake else nullcontext():
        model = nn.Linear(8, 16, bias=False)
        optimizer = torch.optim.AdamW(model.parameters(), fused=False, foreach=False)
        rows = torch.ones(32, 8)
        with MemoryTracker(model, optimizer) as tracker:
            with region("pass 0"):
                output = model(rows).exp()
            with region("loss"):
                loss = output.sum()
            with region("backward"):
                loss.backward()
            gradients = tracker.current.bytes_by_category
            with region("optimizer"):
                optimizer.step()
            after = tracker.current.bytes_by_category
    weight, activations = 8 * 16 * 4, 32 * 16 * 4
    # alive: the input, exp's result (the product itself is not saved), its gradient, the weight's
    assert tracker.peak_by_region["backward"].bytes_by_category == {
        "parameters": weight,
        "gradients": weight,
        "activations pass 0": activations,
        "backward": activations + 4,
        "other": 32 * 8 * 4 + 4,
    }
    assert gradients["gradients"] == gradients["parameters"] == weight
    assert after["optimizer"] == 2 * weight + 4  # two moments and the number of the step
    assert tracker.peak_by_region["pass 0"].bytes_by_category["activations pass 0"] == 2 * activations


class _Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(256, 256))


_USES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "product": lambda rows, weight: rows @ weight,
    "transposed": lambda rows, weight: nn.functional.linear(rows, weight),  # its gradient is a view
    "lookup": lambda rows, weight: nn.functional.embedding(torch.zeros(2, dtype=torch.int64), weight),
}


@pytest.mark.parametrize(
    ("first", "second", "num_weights"),
    [("product", "product", 3), ("product", "lookup", 3), ("lookup", "product", 3), ("transposed", "transposed", 4)],
)
def test_gradients_of_a_weight_that_is_used_twice(first: str, second: str, num_weights: int) -> None:
    """Autograd adds them up in place without a tracker, unless they are views: the weight, both, and their sum."""
    model, rows = _Square(), torch.ones(2, 256)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        (_USES[first](rows, model.weight).sum() + _USES[second](rows, model.weight).sum()).backward()

    with MemoryTracker(model) as tracker:
        step()
    model.zero_grad(set_to_none=True)
    counted = peak_bytes(step, CPU, model.weight.nbytes)
    activations = 8 * rows.nbytes
    assert counted == pytest.approx(num_weights * model.weight.nbytes, abs=activations)
    assert tracker.peak.total_bytes == pytest.approx(counted, abs=activations)


def test_gradients_and_optimizer_state_from_before_are_known() -> None:
    model = nn.Linear(8, 16, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    with MemoryTracker(model, optimizer) as tracker:
        held = tracker.current.bytes_by_category
        model.zero_grad(set_to_none=True)
        assert "gradients" not in tracker.current.bytes_by_category
    weight = 8 * 16 * 4
    assert held == {"parameters": weight, "gradients": weight, "optimizer": 2 * weight + 4}


def test_marks_move_what_was_counted_before() -> None:
    with tracking(keep_timeline=True) as tracker:
        with region("pass 0"):
            kept, dropped = block(2), block(3)
            mark("prefix K/V", kept[:5])
        del dropped
        later = block(1)
        mark("prefix K/V", later)
    expected = {"prefix K/V": 2 * KIB, "activations pass 0": 3 * KIB}
    assert tracker.peak.bytes_by_category == expected
    assert tracker.peak_by_region["pass 0"].bytes_by_category == expected
    # the block that came later was not there yet
    assert [snapshot.bytes_by_category.get("prefix K/V", 0) // KIB for snapshot in tracker.timeline] == [2, 2, 2, 3]
    assert [snapshot.total_bytes // KIB for snapshot in tracker.timeline] == [2, 5, 2, 3]
    assert [snapshot.event for snapshot in tracker.timeline] == [1, 2, 3, 4]
    mark("prefix K/V gradients", later)  # nobody listens any more
    assert tracker.current.bytes_by_category == {"prefix K/V": 3 * KIB}
    del kept
    assert tracker.current.total_bytes == 3 * KIB  # as it was at the end


def test_reset_peak_begins_with_what_is_held() -> None:
    with tracking(keep_timeline=True) as tracker:
        first, second = block(2), block(3)
        del second
        tracker.reset_peak()
        assert tracker.peak.total_bytes == 2 * KIB
        assert dict(tracker.peak_by_region) == {}
        with region("loss"):
            third = block(1)
    assert tracker.peak.total_bytes == 3 * KIB
    assert [snapshot.total_bytes // KIB for snapshot in tracker.timeline] == [2, 3]
    del first, third


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("pass 0", "activations pass 0"),
        ("recompute pass 2", "activations pass 2"),
        ("lm head", "log-probs"),
        ("backward", "backward"),
        ("backward pass 1", "backward"),
        ("optimizer", "optimizer"),
        ("loss", "other"),
        (None, "other"),
    ],
)
def test_category_of_region(name: str | None, category: str) -> None:
    assert category_of_region(name) == category


def _groups() -> list[kvpref.Group]:
    return [
        kvpref.Group(
            [
                kvpref.Sequence.from_prompt_and_response(tokens(150 + index, index), tokens(30, 10 * index + answer))
                for answer in range(4)
            ]
        )
        for index in range(2)
    ]


def _mean_logp(
    policy: kvpref.ResponseLogps, reference: kvpref.ResponseLogps | None, batch: kvpref.Batch
) -> kvpref.LossOutput:
    return kvpref.LossOutput(-policy.sum().mean(), {})


@pytest.mark.parametrize("mode", ["two_pass", "packed", "padded"])
def test_a_real_step_is_what_the_allocator_counts(mode: str) -> None:
    """To 1%: the allocator also counts what kernels take while they run, which is not the peak here.

    Two micro-batches, because in the second one gradients add up.
    """
    model = kvpref.attach(tiny_model("llama", hidden_size=64, intermediate_size=256, vocab_size=1001))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    micro_batches = make_micro_batches(model, [[group] for group in _groups()], _mean_logp, mode=mode, device=CPU)
    step = TrainStep(model, _mean_logp, micro_batches, mode, optimizer)
    step.run()
    with MemoryTracker(model, optimizer) as tracker:
        step.run()
        tracker.reset_peak()
        step.run()
    at_end = tracker.current.bytes_by_category
    # What was allocated before the profiler watched must not be freed while it does: it counts some of that.
    model.zero_grad(set_to_none=True)
    counted = peak_bytes(step.run, CPU, sum(at_end.values()) - at_end["gradients"])
    assert tracker.peak.total_bytes == pytest.approx(counted, rel=0.01)
    resident = sum(tracker.peak.bytes_by_category[name] for name in ("parameters", "optimizer"))
    assert resident == step.resident_bytes()
    assert tracker.peak_by_region["pass 0"].total_bytes <= tracker.peak.total_bytes
    assert at_end["gradients"] == sum(parameter.nbytes for parameter in model.parameters())


def test_prefix_keys_and_values_take_exactly_their_formula() -> None:
    model = kvpref.attach(tiny_model("llama"))
    batch = kvpref.collate(_groups())
    with MemoryTracker(model) as tracker:
        cache = kvpref.encode_prefix(model, batch)
        held = tracker.current.bytes_by_category["prefix K/V"]
    config, num_prefix_tokens = model.config, 150 + 151
    assert cache.num_bytes == held
    assert held == 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * num_prefix_tokens * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_threads_of_autograd_are_followed() -> None:
    """They know no region of their own. Elementwise operators on whole blocks, so that the allocator rounds nothing."""
    device = torch.device("cuda")
    model = nn.ParameterList([torch.ones(512 * KIB, device=device)])
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with MemoryTracker(model) as tracker:
        with region("pass 0"):
            output = (2 * model[0]).exp()
        with region("backward"):
            output.backward(torch.ones_like(output))
    assert tracker.peak.total_bytes - model[0].nbytes == torch.cuda.max_memory_allocated(device) - before
    assert tracker.peak.region == "backward"
    assert tracker.peak_by_region.keys() == {"pass 0", "backward"}
    assert tracker.current.bytes_by_category["gradients"] == model[0].nbytes

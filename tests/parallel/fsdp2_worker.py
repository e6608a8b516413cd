"""Run under torchrun by test_fsdp2: gradients of sharded ranks beside those of one process, and their collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from preference_runs import VOCAB_SIZE, make_groups, make_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from two_processes import leave_together

import kvpref
from kvpref.models.support import unwrap
from kvpref.profiling.memory.tracker import MemoryTracker

TOLERANCE = 1e-10
MAX_COLLECTIVES = 1.15
"""Times those of a plain forward and backward."""

MAX_GROWTH = 1.10
"""Of the peak, from 8 responses to 64."""

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"checkpoint": "all"},
    {"mode": "one_pass"},
    {"mode": "packed"},
    {"reduce_grads": "step"},
    {"schedule": "bounded", "max_tokens_per_chunk": 10},
    {"schedule": "bounded", "max_tokens_per_chunk": 10, "gather_weights": "step"},
    {"schedule": "bounded", "max_tokens_per_chunk": 7, "reduce_grads": "step", "checkpoint": "prefix"},
    {"schedule": "bounded", "max_tokens_per_chunk": 10, "gather_weights": "step", "reduce_grads": "step"},
    {"schedule": "bounded"},
)


def deep_groups() -> list[kvpref.Group]:
    """Four responses each, of which two and two share their beginnings: trees of three levels."""
    groups = []
    for index, group in enumerate(make_groups(num_groups=4, seed=1)):
        sequences = []
        for sequence in group.sequences:
            ids, scored = sequence.input_ids, sequence.scored
            sequences += [
                kvpref.Sequence(input_ids=(*ids, *([turn] * 9), turn + 1), scored=(*scored, *([False] * 9), True))
                for turn in (index, index + 20)
            ]
        groups.append(kvpref.Group(sequences, labels=[True, True, False, False], id=f"deep:{index}"))
    return groups


def share(rank: int, world_size: int) -> list[list[kvpref.Group]]:
    """The two micro-batches of a rank: different in number and depth of passes, and of chunks."""
    alone = [kvpref.Group(group.sequences[:1], labels=[True], id=group.id) for group in make_groups(3, seed=2)]
    if rank == 0:
        return [alone[:2], alone[2:]]
    deep, pairs = deep_groups(), make_groups(world_size, seed=3)
    return [[deep[rank % 4], pairs[rank]], [deep[(rank + 1) % 4]]]


def loss(policy: kvpref.ResponseLogps, reference: object, batch: kvpref.Batch) -> kvpref.LossOutput:
    """A nonlinear function of every response."""
    return kvpref.LossOutput(loss=torch.nn.functional.softplus(0.1 * policy.sum()).mean(), metrics={})


def adapted(model: Any) -> nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    return get_peft_model(model, config).double()


def sharded(make: Callable[[], nn.Module]) -> nn.Module:
    model = kvpref.attach(make())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in unwrap(model).base_model.h:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run_step(model: nn.Module, micro_batches: list[list[kvpref.Group]], num_ranks: int, **settings: Any) -> None:
    """Forward and backward of all micro-batches; the loss is a mean over all ranks' micro-batches."""
    reduce_each = settings.get("reduce_grads") != "step"
    for index, groups in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(reduce_each or is_last)  # as accelerate's no_sync does
        kvpref.forward_backward(model, kvpref.collate(groups), loss, **settings)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: getattr(item.grad, "full_tensor", lambda grad=item.grad: grad)()
        for name, item in model.named_parameters()
        if item.requires_grad
    }


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: object) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm().clamp(min=1e-8)
        assert error < TOLERANCE, f"{what}, {name}: relative error {error:.2e}"


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often weights are gathered and gradients reduced inside."""
    counts: Counter[str] = Counter()
    # torch 2.13 has other names for what torch 2.11 calls by the first of each pair.
    pairs = {
        "all_gather_into_tensor": "gather",
        "all_gather_single": "gather",
        "reduce_scatter_tensor": "reduce",
        "reduce_scatter_single": "reduce",
    }
    names = [name for name in pairs if hasattr(dist, name)]
    before = {name: getattr(dist, name) for name in names}

    def counting(name: str, *args: Any, **kwargs: Any) -> Any:
        counts[pairs[name]] += 1
        return before[name](*args, **kwargs)

    for name in names:
        setattr(dist, name, partial(counting, name))
    try:
        yield counts
    finally:
        for name in names:
            setattr(dist, name, before[name])


def check_gradients() -> None:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    shares = [share(other, num_ranks) for other in range(num_ranks)]
    for make in (make_model, lambda: adapted(make_model())):
        alone = kvpref.attach(make())
        for micro_batches in shares:
            run_step(alone, micro_batches, num_ranks)
        expected = {name: grad / num_ranks for name, grad in gradients(alone).items()}
        model = sharded(make)
        for settings in SETTINGS:
            model.zero_grad()
            run_step(model, shares[rank], num_ranks, **settings)
            assert_close(gradients(model), expected, settings)


def check_collectives() -> None:
    """`full` in two passes beside a plain forward and backward of the same model."""
    model = sharded(make_model)
    input_ids = torch.randint(VOCAB_SIZE, (2, 20))
    with counted() as plain:
        model(input_ids=input_ids, labels=input_ids).loss.backward()
    groups = share(dist.get_rank(), dist.get_world_size())[0]
    with counted() as ours:
        kvpref.forward_backward(model, kvpref.collate(groups), loss)
    assert plain["gather"]
    assert ours["reduce"] == plain["reduce"] > 0
    assert ours.total() <= MAX_COLLECTIVES * plain.total(), (ours, plain)
    with counted() as ours:
        kvpref.forward_backward(
            model,
            kvpref.collate(groups),
            loss,
            schedule="bounded",
            max_tokens_per_chunk=10,
            gather_weights="step",
            reduce_grads="step",
        )
    assert ours.total() <= MAX_COLLECTIVES * plain.total(), (ours, plain)


def check_scores() -> None:
    """Log-probs without gradient, of ranks with different numbers of passes; weights are in pieces afterwards."""
    model, alone = sharded(make_model), kvpref.attach(make_model())
    groups = share(dist.get_rank(), dist.get_world_size())[0]
    batch = kvpref.collate(groups)
    for settings in SETTINGS:
        options = kvpref.engine.options.EngineOptions(**settings)
        found = kvpref.engine.schedules.score(model, batch, options).token_logps
        expected = kvpref.engine.schedules.score(alone, batch, options).token_logps
        assert torch.allclose(found, expected, atol=TOLERANCE)
        # The root stays gathered after a forward that runs each layer once: FSDP2's own default.
        assert all(hasattr(item, "full_tensor") for item in unwrap(model).base_model.h.parameters())


def check_memory() -> None:
    """The peak of a rank does not grow with the responses in the bounded schedule, whatever other ranks hold."""
    own = dist.get_rank() + 1  # so many times fewer than rank 0 has
    peaks = {
        (schedule, count): peak_of_step(count // own, schedule) for schedule in ("bounded", "full") for count in (8, 64)
    }
    assert peaks["bounded", 64] <= MAX_GROWTH * peaks["bounded", 8], peaks
    assert peaks["full", 64] > 2 * peaks["full", 8], peaks


def peak_of_step(num_responses: int, schedule: str) -> int:
    """Bytes of a step's tensors. Not by PyTorch's allocator, whose profiler misses what gloo's threads free."""
    model = sharded(make_model)
    prompt = [index % VOCAB_SIZE for index in range(60)]
    answers = [[index % VOCAB_SIZE, *range(20)] for index in range(num_responses)]
    batch = kvpref.collate([kvpref.Group([kvpref.Sequence.from_prompt_and_response(prompt, own) for own in answers])])
    bound = {"max_tokens_per_chunk": 64} if schedule == "bounded" else {}
    with MemoryTracker(model) as tracker:
        kvpref.forward_backward(model, batch, loss, schedule=schedule, **bound)
    return tracker.peak.total_bytes


if __name__ == "__main__":
    dist.init_process_group("gloo")
    check_gradients()
    check_collectives()
    check_scores()
    check_memory()
    leave_together()

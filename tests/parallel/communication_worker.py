"""Run under torchrun by test_communication: what FSDP2 sends in a step, counted, beside what `kvpref plan` predicts."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import tiny_config, tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from two_processes import leave_together

import kvpref
from kvpref.engine.options import EngineOptions
from kvpref.engine.schedules import forward_backward_step
from kvpref.plan.step import join_batches
from kvpref.profiling.prediction.fit import VariantPlan
from kvpref.profiling.prediction.model import TrainingSetup
from kvpref.profiling.prediction.passes import step_passes
from kvpref.profiling.prediction.peak import Predictor
from kvpref.profiling.prediction.ranks import Ranks, communication
from kvpref.profiling.prediction.step import GroupShape

SHAPE = GroupShape(prompt_tokens=23, response_tokens=6, num_responses=3)
GROUPS_PER_RANK = 2
PADDING = 0.01
HEAD = 0.05
VARIANTS = {
    "full": EngineOptions(),
    "packed": EngineOptions(mode="packed"),
    "bounded": EngineOptions(schedule="bounded", max_tokens_per_chunk=10),
    "bounded, whole gradients": EngineOptions(schedule="bounded", max_tokens_per_chunk=10, reduce_grads="step"),
    "bounded, whole weights": EngineOptions(schedule="bounded", max_tokens_per_chunk=10, gather_weights="step"),
    "bounded, kept": EngineOptions(
        schedule="bounded", max_tokens_per_chunk=10, gather_weights="step", reduce_grads="step"
    ),
}
# torch 2.13 has other names for what torch 2.11 calls by the first.
COLLECTIVES = {
    "all_gather_into_tensor": "gather",
    "all_gather_single": "gather",
    "reduce_scatter_tensor": "reduce",
    "reduce_scatter_single": "reduce",
}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Collectives inside, and the bytes that each rank receives in them."""
    counts: Counter[str] = Counter()
    before = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    others = (dist.get_world_size() - 1) / dist.get_world_size()

    def counting(name: str, *args: Any, **kwargs: Any) -> Any:
        kind = COLLECTIVES[name]
        tensors = [*args, *kwargs.values()]
        counts[kind] += 1
        counts[f"{kind} bytes"] += round(others * max(t.nbytes for t in tensors[:2] if torch.is_tensor(t)))
        return before[name](*args, **kwargs)

    for name in before:
        setattr(dist, name, partial(counting, name))
    try:
        yield counts
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def sharded() -> nn.Module:
    model = kvpref.attach(tiny_model("llama", dtype=torch.float32))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def loss(policy: kvpref.ResponseLogps, reference: object, batch: kvpref.Batch) -> kvpref.LossOutput:
    return kvpref.LossOutput(loss=policy.sum().mean(), metrics={})


def run(model: nn.Module, variant: EngineOptions) -> None:
    batches = [SHAPE.batch(1) for _ in range(GROUPS_PER_RANK)]
    for other, batch in enumerate(batches):
        # Groups that share nothing with one another.
        groups = [
            kvpref.Group(
                [
                    kvpref.Sequence(input_ids=[(token + 20 * other) % 60 for token in s.input_ids], scored=s.scored)
                    for s in group.sequences
                ]
            )
            for group in batch.groups
        ]
        batches[other] = kvpref.collate(groups)
    if variant.schedule == "bounded":
        joined = join_batches(batches, max_tokens_per_chunk=variant.chunk_tokens)
        backward = lambda value, _: value.backward()  # noqa: E731
        forward_backward_step(model, joined, loss, variant, references=[None] * len(batches), backward=backward)
        return
    for batch in batches:
        kvpref.engine.schedules.forward_backward(model, batch, loss, variant)


def agrees(what: str, count: int, expected: int) -> bool:
    """Counts are exact. Shards of unequal rows are padded; chunks of prompts do not reduce the head's gradients."""
    if "bytes" not in what:
        return count == expected
    return (1 - HEAD if what == "reduce bytes" else 1 - PADDING) * expected <= count <= (1 + PADDING) * expected


def predicted(name: str) -> Counter[str]:
    setup = TrainingSetup(dtype=torch.float32, device_type="cpu")
    predictor = Predictor(tiny_config("llama"), setup, ranks=Ranks(world_size=dist.get_world_size()))
    variant = VARIANTS[name]
    one = predictor.peak(variant, SHAPE)
    plan = VariantPlan(
        name=name,
        variant=variant,
        one_group=one,
        num_groups=1,
        largest=one,
        max_tokens_per_micro_batch=SHAPE.unique_tokens,
        max_responses=SHAPE.num_responses,
    )
    passes = step_passes(plan, SHAPE, GROUPS_PER_RANK)
    found = communication(predictor.ranks, variant, predictor.model_bytes, passes, predictor.heads_bytes)
    return Counter(
        {
            "gather": found.num_gathers,
            "gather bytes": found.gathered_bytes,
            "reduce": found.num_reductions,
            "reduce bytes": found.reduced_bytes,
        }
    )


if __name__ == "__main__":
    dist.init_process_group("gloo")
    wrong = []
    for name, variant in VARIANTS.items():
        model = sharded()
        with counted() as counts:
            run(model, variant)
        expected = predicted(name)
        if any(not agrees(what, counts[what], expected[what]) for what in expected):
            wrong.append(f"{name}: {dict(counts)}, predicted {dict(expected)}")
    print("\n".join(wrong), file=sys.stderr, flush=True)
    assert not wrong, wrong
    leave_together()

"""Run under torchrun by test_sharded: a loop of one's own over a model in DDP or FSDP2; ranks differ in passes."""

from __future__ import annotations

from typing import Any

import agent_rows
import oracle
import torch
from tiny_models import tiny_model
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from two_processes import leave_together

import kvpref

# float64: two orders of summation.
TOLERANCE = 1e-10


def rows(rank: int) -> dict[str, torch.Tensor]:
    """Rank 0 has attempts that branch, rank 1 rows that share nothing."""
    return agent_rows.padded([agent_rows.attempts_that_branch, agent_rows.alone][rank](), "both")


def loss_of(found: kvpref.TreeLogps) -> torch.Tensor:
    """Another weight at every place."""
    assert found.entropy is not None
    weights = torch.randn(2, *found.logps.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (weights[0] * found.logps).sum() + (weights[1] * found.entropy).sum()


def wrapped(kind: str) -> nn.Module:
    model: Any = kvpref.attach(tiny_model("llama", torch.float64))
    if kind == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def grads_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, weight in model.named_parameters():
        grad = weight.grad
        assert grad is not None
        found[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return found


def check(kind: str) -> None:
    """Gradients are the mean over ranks of those of one process, in each of two steps of a loop and in `bounded`."""
    whole = kvpref.attach(tiny_model("llama", torch.float64))
    with oracle.true_float64():
        for rank in range(2):
            (loss_of(kvpref.tree_logps(whole, rows(rank))) / 2).backward()
    truth, own, model = grads_of(whole), rows(distributed.get_rank()), wrapped(kind)
    for schedule in ("", "", "bounded"):
        model.zero_grad()
        with oracle.true_float64():
            if schedule:
                kvpref.tree_forward_backward(model, own, loss_of, schedule=schedule, max_tokens_per_chunk=24)
            else:
                with torch.no_grad():
                    old = kvpref.tree_logps(model, own)
                found = kvpref.tree_logps(model, own)
                assert oracle.relative_error(found.logps.detach(), old.logps) <= TOLERANCE
                loss_of(found).backward()
        for name, grad in grads_of(model).items():
            assert oracle.relative_error(grad, truth[name]) <= TOLERANCE, (kind, schedule, name)


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    check("fsdp2")
    check("ddp")
    leave_together()

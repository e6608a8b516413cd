"""Run under torchrun by test_distributed: optimizer steps on this rank's share, results written by rank 0."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from preference_runs import make_args, make_groups, make_model, reference_free_loss, split_unevenly
from torch.nn.parallel import DistributedDataParallel
from two_processes import leave_together

import kvpref


def run_bounded(output: str) -> None:
    """The bounded schedule in DistributedDataParallel; ranks hold different data, in different numbers of chunks.

    Two synchronised steps, then one without synchronisation whose gradients the next one carries along.
    """
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(kvpref.attach(make_model()))
    shares = split_unevenly(make_groups())
    num_groups = sum(map(len, shares))

    def step(groups: list[kvpref.Group]) -> None:
        # Ranks are averaged, so each rank's mean is weighted by its share of the groups.
        weight = len(groups) * world_size / num_groups
        kvpref.forward_backward(
            model,
            kvpref.collate(groups),
            reference_free_loss,
            schedule="bounded",
            max_tokens_per_chunk=10,
            backward=partial(_weighted_backward, weight=weight),
        )

    grads = []
    for synchronised in (True, True, False):
        model.zero_grad()
        with nullcontext() if synchronised else model.no_sync():
            step(shares[rank])
        if not synchronised:
            local = [parameter.grad.clone() for parameter in model.parameters()]
            assert any(_differs(grad) for grad in local), "no_sync must leave gradients local"
            step(shares[rank])
        grads.append({name: parameter.grad.clone() for name, parameter in model.module.named_parameters()})
    if rank == 0:
        torch.save(grads, f"{output}/grads.pt")


def _differs(tensor: torch.Tensor) -> bool:
    """Whether ranks hold different values."""
    mean = tensor.clone()
    dist.all_reduce(mean)
    return not torch.allclose(mean / dist.get_world_size(), tensor)


def _weighted_backward(loss: torch.Tensor, weight: float) -> None:
    (loss * weight).backward()


def run_trainer(output: str) -> None:
    """The trainer in schedule ``full``, with groups that exceed the budget on one rank or the other."""
    args = make_args(f"{output}/run", max_tokens_per_micro_batch=34, per_device_train_batch_size=3)
    trainer = kvpref.PreferenceTrainer(make_model(), args, train_dataset=make_groups())
    trainer.train()
    if args.process_index == 0:
        torch.save(dict(trainer.model.named_parameters()), f"{output}/weights.pt")


if __name__ == "__main__":
    {"bounded": run_bounded, "trainer": run_trainer}[sys.argv[1]](sys.argv[2])
    leave_together()

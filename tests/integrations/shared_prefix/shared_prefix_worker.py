"""Run under torchrun by test_sharded: a loop over a model that FSDP2 shards, one rank of which has nothing to share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import torch
from padded_batches import one_prompt, padded, switch_on, unlike_rows
from tiny_models import tiny_model, tiny_reward_model
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from two_processes import leave_together

TOLERANCE = 1e-10


def batches() -> list[dict[str, Any]]:
    """What rank 0 is given, whose rows share a prompt, and rank 1, whose rows do not."""
    return [padded(one_prompt()), padded(unlike_rows())]


def loss_of(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Of either kind of model."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        loss: torch.Tensor = model(**inputs).loss
        return loss
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.square().mean()


def shard(model: Any, *, apart: bool) -> None:
    """Layers and the rest; or embeddings and head in groups of their own too."""
    for layer in model.model.layers:
        fully_shard(layer)
    if apart:
        fully_shard(model.model.embed_tokens)
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    fully_shard(model)


def check(build: Callable[[], Any], *, apart: bool = False, checkpoints: bool = False, late: bool = False) -> None:
    """Gradients of two steps are those of one process that has both ranks' rows."""
    rank, whole, sharded = distributed.get_rank(), build(), build()
    for inputs in batches():
        with oracle.precision(whole):
            (loss_of(whole, inputs) / 2).backward()
    if checkpoints:
        sharded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if late:
        shard(sharded, apart=apart)
    with switch_on(sharded) as switch:
        if not late:
            shard(sharded, apart=apart)
        for _ in range(2):
            sharded.zero_grad()
            with oracle.precision(sharded):
                loss_of(sharded, batches()[rank]).backward()
    assert switch.stats.num_served == (2 if rank == 0 else 0), switch.stats
    truth = dict(whole.named_parameters())
    for name, weight in sharded.named_parameters():
        grad, true_grad = weight.grad.full_tensor(), truth[name].grad
        assert true_grad is not None
        assert (grad - true_grad).norm() <= TOLERANCE * true_grad.norm(), name


def main() -> None:
    distributed.init_process_group("gloo")

    def language_model() -> Any:
        return tiny_model("llama", torch.float64)

    check(language_model)
    check(language_model, apart=True, checkpoints=True, late=True)
    check(lambda: tiny_reward_model("llama", torch.float64), late=True)


if __name__ == "__main__":
    main()
    leave_together()

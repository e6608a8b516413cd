"""A margin per token between chosen and rejected response, each pair with a weight that stands in the data.

    python examples/weighted_margin.py
    kvpref train ./my-model pairs.jsonl --output out --loss examples/weighted_margin.py:weighted_margin

The second needs a field `weight` in every row of pairs.jsonl; ``--loss-arg margin=2`` asks for a wider margin.
"""

from __future__ import annotations

import torch
import toy

import kvpref


@kvpref.loss(columns=["weight"])
def weighted_margin(policy, reference, batch, *, margin=1.0):
    """Mean over pairs of ``weight * max(0, margin - gap)``, the gap in nats per token, whatever the lengths."""
    chosen, rejected = policy.mean().view(-1, 2).unbind(1)
    weights = batch.sequence_column("weight").view(-1, 2)[:, 0]
    gaps = chosen - rejected
    loss = (weights * torch.relu(margin - gaps)).mean()
    return kvpref.LossOutput(loss, {"gap": gaps.detach().mean()})


if __name__ == "__main__":
    pairs = toy.make_pairs(weight=[0.5 + index % 2 for index in range(48)])
    logged = toy.train(weighted_margin, pairs)
    print(f"loss {logged[0]['loss']:.3f} -> {logged[-1]['loss']:.3f}")
    print(f"gap {logged[0]['gap']:.3f} -> {logged[-1]['gap']:.3f} nats per token")

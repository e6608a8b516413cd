"""DPO that is paid for staying uncertain: the entropy of every scored token, computed in the pass that gives log-probs.

python examples/entropy_dpo.py
kvpref train ./my-model pairs.jsonl --output out --loss examples/entropy_dpo.py:entropy_dpo --loss-arg alpha=0.05
"""

from __future__ import annotations

from functools import partial

import toy
from torch.nn.functional import logsigmoid

import kvpref


@kvpref.loss(needs_reference=True, entropy=True)
def entropy_dpo(policy, reference, batch, *, beta=0.1, alpha=0.1):
    """Sigmoid DPO minus `alpha` times the mean entropy of a pair's tokens, in nats."""
    chosen, rejected = (beta * (policy.sum() - reference.sum())).view(-1, 2).unbind(1)
    entropy = policy.mean_of(policy.entropy).view(-1, 2).mean(1)
    losses = -logsigmoid(chosen - rejected) - alpha * entropy
    metrics = {"margin": (chosen - rejected).detach().mean(), "entropy": entropy.detach().mean()}
    return kvpref.LossOutput(losses.mean(), metrics)


if __name__ == "__main__":
    last = {alpha: toy.train(partial(entropy_dpo, alpha=alpha), toy.make_pairs())[-1] for alpha in (0.0, 1.0)}
    for alpha, line in last.items():
        print(f"alpha {alpha}: margin {line['margin']:.3f}, entropy {line['entropy']:.3f} nats")

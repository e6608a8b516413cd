"""Policy gradient from given scores with a learned baseline: a value head predicts a response's score at each token.

    python examples/actor_critic.py
    kvpref train ./my-model groups.jsonl --output out --loss examples/actor_critic.py:actor_critic

The command adds the value head itself, and saves it with the model.
"""

from __future__ import annotations

import torch
import toy

import kvpref


@kvpref.loss(values=True)
def actor_critic(policy, reference, batch, *, value_weight=1.0):
    """Mean over responses, and over their tokens, of ``-(score - value) log pi(token) + (score - value)^2``."""
    scores = torch.tensor([score for group in batch.groups for score in group.scores], device=batch.device)
    returns = policy.per_token(scores)
    advantages = returns - policy.values.detach()
    actor = -policy.mean_of(advantages * policy.token_logps).mean()
    critic = policy.mean_of((returns - policy.values) ** 2).mean()
    return kvpref.LossOutput(actor + value_weight * critic, {"value_error": critic.detach()})


if __name__ == "__main__":
    model = toy.make_model()
    kvpref.add_value_head(model)
    logged = toy.train(actor_critic, toy.make_scored_groups(), model)
    print(f"squared error of the values {logged[0]['value_error']:.3f} -> {logged[-1]['value_error']:.3f}")

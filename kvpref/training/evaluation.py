"""Checks, before a run starts, that evaluations provide what the run relies on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from transformers.trainer_utils import IntervalStrategy

from kvpref.data import PreferenceDataset
from kvpref.errors import InputError
from kvpref.losses import PreferenceLoss, registered_name
from kvpref.plan.batch import Batch, collate
from kvpref.records.outputs import ResponseLogps, ResponseRewards
from kvpref.training.arguments import PreferenceTrainingArguments

_GROUPS_PER_TRY = 32
_ALWAYS = ("loss", "eval_loss")


def check_evaluation(args: PreferenceTrainingArguments, dataset: object) -> None:
    """Raise InputError for arguments that need evaluations if there are none."""
    wishes = {
        "load_best_model_at_end": args.load_best_model_at_end,
        f"eval_strategy={str(IntervalStrategy(args.eval_strategy).value)!r}": args.eval_strategy != "no",
        "eval_on_start": args.eval_on_start,
    }
    for wish, is_set in wishes.items():
        if is_set and dataset is None:
            raise InputError(f"{wish} needs evaluation data; give an eval_dataset (--eval-data), or leave it out")
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise InputError(
            "save_strategy='best' saves after evaluations; set eval_strategy, and give an eval_dataset (--eval-data)"
        )


def check_best_metric(
    args: PreferenceTrainingArguments, dataset: PreferenceDataset, loss: PreferenceLoss, hidden_size: int
) -> None:
    """Raise InputError if evaluations do not report `metric_for_best_model`.

    What a loss logs depends on the data, so the loss is tried on the data with made-up log-probs.

    Args:
        args: The arguments.
        dataset: The evaluation data.
        loss: The loss.
        hidden_size: The model's hidden size.
    """
    wanted = args.metric_for_best_model
    if wanted is None or wanted in _ALWAYS:
        return
    name, found = wanted.removeprefix("eval_"), {"loss"}
    try:
        for metrics in _metrics(dataset, loss, hidden_size):
            found |= metrics
            if name in found:
                return
    except InputError:
        raise
    except Exception:  # a user's loss may not accept made-up log-probs
        return
    raise InputError(
        f"metric_for_best_model {wanted!r} is not reported by evaluations of the loss {registered_name(loss)}; "
        f"choose from: {', '.join(f'eval_{metric}' for metric in sorted(found))}"
    )


@torch.no_grad()
def _metrics(dataset: PreferenceDataset, loss: PreferenceLoss, hidden_size: int) -> Iterator[set[str]]:
    """The names that the loss logs, for one batch of groups after another."""
    groups = (group for group in dataset if not (loss.can_be_idle and loss.idle(group)))
    while some := tuple(islice(groups, _GROUPS_PER_TRY)):
        batch = collate(some)
        policy = _made_up(batch, loss, hidden_size)
        output = loss(policy, policy if loss.needs_reference else None, batch)  # type: ignore[arg-type]
        yield set(output.metrics)


def _made_up(batch: Batch, loss: PreferenceLoss, hidden_size: int) -> ResponseLogps | ResponseRewards:
    """Zeros for everything that the loss reads."""
    if loss.reads == "ends":
        return ResponseRewards(rewards=torch.zeros(batch.num_sequences), group_index=batch.group_index)
    num_scored, head = batch.num_scored_tokens, loss.head

    def per_token(is_read: bool) -> torch.Tensor | None:
        return torch.zeros(num_scored) if is_read else None

    return ResponseLogps(
        token_logps=torch.zeros(num_scored),
        cu_seqlens=batch.cu_seqlens,
        group_index=batch.group_index,
        entropy=per_token(head.entropy),
        collision=per_token(head.collision),
        mean_logits=per_token(head.mean_logits),
        hidden=torch.zeros(num_scored, hidden_size) if head.hidden else None,
        values=per_token(head.values),
        logits=torch.zeros(num_scored, len(head.logit_ids)) if head.logit_ids else None,
        weights=batch.token_weights(torch.float32),
    )

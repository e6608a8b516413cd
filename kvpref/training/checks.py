"""What the trainer checks before a run starts: that model, data and loss fit one another."""

from __future__ import annotations

from torch import nn

from kvpref.data import PreferenceDataset
from kvpref.errors import InputError
from kvpref.losses import PreferenceLoss, loss_name
from kvpref.modeling.head import is_reward_model
from kvpref.modeling.support import unwrap
from kvpref.training.inputs import check_lengths


def check_model_kind(model: nn.Module, loss: PreferenceLoss) -> None:
    """Raise InputError if the model has not the head whose output the loss reads."""
    inner = unwrap(model)
    found = f"loss {loss_name(loss)!r} reads {{}}, and {type(inner).__name__} {{}}"
    if loss.reads == "ends":
        if not is_reward_model(inner):
            reads, has = "one reward per response", "has a language-model head"
            raise InputError(f"{found.format(reads, has)}; load AutoModelForSequenceClassification with num_labels=1")
        if inner.config.num_labels != 1:
            reads, has = "one reward per response", f"gives {inner.config.num_labels} numbers"
            raise InputError(f"{found.format(reads, has)}; load it with num_labels=1")
    elif is_reward_model(inner):
        reads, has = "log-probs of tokens", "has none"
        raise InputError(f"{found.format(reads, has)}; load AutoModelForCausalLM, or choose a loss of rewards")


def check_data(dataset: PreferenceDataset, model: nn.Module, loss: PreferenceLoss) -> None:
    """Raise InputError for the first group that is too long for the model, or lacks what the loss reads."""
    check_lengths(dataset, model)
    check_columns(dataset, loss)


def check_columns(dataset: PreferenceDataset, loss: PreferenceLoss) -> None:
    """Raise InputError for the first group without a column that the loss reads."""
    if not loss.columns:
        return
    for group in dataset:
        for name in loss.columns:
            if name not in group.columns:
                has = ", ".join(group.columns) or "none"
                raise InputError(
                    f"{group.id}: loss {loss_name(loss)!r} reads the column {name!r}, which this group lacks; its "
                    f"extra columns: {has}"
                )

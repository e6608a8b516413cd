"""Unknown settings, losses and settings of losses, with what was meant."""

from __future__ import annotations

import pytest

from kvpref.cli.given_settings import Given
from kvpref.cli.name_checks import check_loss_name, check_names
from kvpref.errors import InputError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", 1, "x: there is no setting 'lr'; did you mean learning_rate?"),
        ("warmup_ratio", 1, "did you mean warmup_steps? below 1 it is a share of all steps, such as warmup_steps=0.1"),
        ("learning_rte", 1, "did you mean learning_rate?"),
        ("dtaa", "d", "did you mean data?"),
        ("tau", 1, "it is a setting of the loss: --loss-arg tau=VALUE, in a file loss_args: {tau: VALUE}"),
        ("loss", "dppo", "x: unknown loss 'dppo'; did you mean dpo?"),
        ("loss", "what", "unknown loss 'what'; choose from: dpo, "),
        ("loss_args.betta", 1, "x: loss 'dpo' has no setting 'betta'; did you mean beta? it has: beta, "),
        ("loss_args.zzz", 1, "loss 'dpo' has no setting 'zzz'; it has: beta, "),
        ("lr_scheduler_type", "cosin", "x: expected one of linear, cosine, "),
        ("lr_scheduler_type", "cosin", "; got 'cosin'; did you mean cosine?"),
        ("optim", "adamw", "did you mean adamw_"),
        ("schedule", "bound", "expected one of full, bounded; got 'bound'; did you mean bounded?"),
    ],
)
def test_it_is_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_names({name: Given(value, "x")}, loss="dpo")
    assert message in str(caught.value)


def test_what_may_be_right_passes() -> None:
    check_names({"loss_args.betta": Given(1, "x"), "loss": Given("mine.py:f", "x")}, loss="mine.py:f")
    check_names({"loss_args.betta": Given(1, "x")}, loss=None)
    check_names({"save_strategy": Given(False, "x"), "eval_strategy": Given("epoch", "x")}, loss="dpo")
    check_names({"max_steps": Given(1, "x"), "data": Given("d", "x"), "mode": Given(None, "x")}, loss="dpo")
    for name in ("dpo", "mpo", "package.module:function"):
        check_loss_name(name, "x")

"""Bradley-Terry on a reward model, against TRL's own loss, gradient and metrics for the same pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs the extra kvpref[trl]")

import trl_runs  # noqa: E402
from tiny_models import tiny_config  # noqa: E402
from transformers import AutoModelForSequenceClassification  # noqa: E402

import kvpref  # noqa: E402
from kvpref.losses import make_loss  # noqa: E402
from kvpref.records.outputs import ResponseRewards  # noqa: E402

# float32 losses of order one
TOLERANCE = 1e-6

MARGINS = [0.5, 0.25, 0.0, 1.0]


@pytest.mark.parametrize("margin", [None, "margin"])
@pytest.mark.parametrize("centering", [None, 0.05])
def test_it_is_trls_reward_loss(margin: str | None, centering: float | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1))
    trainer = trl.RewardTrainer(
        model=model,
        args=trl_runs.make_args(trl.RewardConfig, tmp_path, center_rewards_coefficient=centering),
        train_dataset=trl_runs.pairs(4),
        processing_class=trl_runs.make_tokenizer(),
    )
    rows: list[dict[str, Any]] = [trainer.train_dataset[index] for index in range(4)]
    inputs = trainer.data_collator([{**row, "margin": m} for row, m in zip(rows, MARGINS, strict=True)])
    if margin is None:
        inputs.pop("margin")
    model.train()
    truth, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
    # TRL's rows are all chosen, then all rejected.
    rewards = outputs.logits.detach().view(2, 4).T.flatten().requires_grad_()
    groups = [
        kvpref.Group(
            [sequence(row["chosen_ids"]), sequence(row["rejected_ids"])], labels=(True, False), columns={"margin": m}
        )
        for row, m in zip(rows, MARGINS, strict=True)
    ]
    batch = kvpref.collate(groups)
    loss = make_loss("bradley_terry", margin_column=margin, center_rewards_coefficient=centering or 0.0)
    output = loss(ResponseRewards(rewards, batch.group_index), None, batch)
    assert output.loss.item() == pytest.approx(truth.item(), abs=TOLERANCE)
    (slopes,) = torch.autograd.grad(truth, outputs.logits)
    output.loss.backward()
    assert rewards.grad is not None
    torch.testing.assert_close(rewards.grad, slopes.view(2, 4).T.flatten(), rtol=0, atol=TOLERANCE)
    for name in ("accuracy", "margin", "mean_reward"):
        assert output.metrics[name].item() == pytest.approx(trainer._metrics["train"][name][-1], abs=TOLERANCE)


def sequence(input_ids: list[int]) -> kvpref.Sequence:
    return kvpref.Sequence.from_prompt_and_response(input_ids[:1], input_ids[1:])

"""KTO and its like on a model: TRL's own losses, gradients and metrics, with TRL's own mismatched rows."""

from __future__ import annotations

from pathlib import Path

import pytest

trl = pytest.importorskip("trl", reason="needs the extra kvpref[trl]")

import trl_objectives  # noqa: E402
import trl_runs  # noqa: E402
from datasets import Dataset  # noqa: E402

import kvpref  # noqa: E402
from kvpref.losses import make_loss  # noqa: E402

NUM_ROWS = 8
METRICS = ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


def labelled() -> Dataset:
    """Single responses to prompts that all differ, so that TRL's rotation mismatches every row."""
    words = trl_runs.Words()
    rows = [{"prompt": words.prompt(), "completion": words.text(1, 9), "label": words.flag()} for _ in range(NUM_ROWS)]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("swaps", [False, True], ids=["", "reference and policy swapped"])
def test_single_responses_are_trls(tmp_path: Path, loss_type: str, swaps: bool) -> None:
    """Swapped, the KL estimate has the other sign: it is cut off at 0 on one side."""
    makers = [trl_objectives.policy_model, trl_objectives.reference_model]
    make_policy, make_reference = makers[::-1] if swaps else makers
    settings = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.6}
    batch_size = {"per_device_train_batch_size": NUM_ROWS, "gradient_checkpointing": False}
    trainer = trl.KTOTrainer(
        model=make_policy(),
        ref_model=make_reference(),
        args=trl_runs.make_args(trl.KTOConfig, tmp_path, loss_type=loss_type, **batch_size, **settings),
        train_dataset=labelled(),
        processing_class=trl_runs.make_tokenizer(),
    )
    rows = list(trainer.train_dataset)
    groups = [
        kvpref.Group(
            [kvpref.Sequence.from_prompt_and_response(row["prompt_ids"], row["completion_ids"])], labels=[row["label"]]
        )
        for row in rows
    ]
    loss = make_loss(loss_type, **settings)
    batch = kvpref.collate(list(loss.prepare(groups)), min_shared_tokens=1)
    found = trl_objectives.run_kvpref(loss, batch, make_policy(), make_reference())
    computed = trainer._compute_loss(trainer.model, trainer.data_collator(rows), False)
    truth = trl_objectives.run_trl(computed, trainer._metrics["train"], trainer.model)
    trl_objectives.assert_same(found, truth, METRICS)
    assert (found.metrics["kl"] > 0.1) == (loss_type == "kto" and not swaps)

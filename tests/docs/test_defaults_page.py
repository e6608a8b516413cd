"""The page of defaults says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from kvpref.losses import LOSSES, make_loss
from kvpref.losses.policy_gradient.base import PolicyGradient
from kvpref.training import PreferenceTrainingArguments

PAGE = (Path(__file__).parents[2] / "docs" / "defaults.md").read_text()
KINDS = {
    "dpo": lambda name: LOSSES[name].needs_reference is True and name not in ("kto", "apo_zero_unpaired"),
    "policy gradients": lambda name: issubclass(LOSSES[name], PolicyGradient),
    "reward models": lambda name: LOSSES[name].reads == "ends",
}
MIXTURES = {"mixture", "mpo", "rpo"}


def test_the_learning_rates_are_those_of_the_losses() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([\de.-]+) \| ([\de.-]+) \|", PAGE, flags=re.MULTILINE)
    listed: set[str] = set()
    for losses, full, adapter in rows:
        first = losses.partition(" and all others")[0].strip("`")
        names = [name for name in LOSSES if KINDS[first](name)] if first in KINDS else re.findall(r"`(\w+)`", losses)
        for name in set(names) - MIXTURES:
            rates = make_loss(name).learning_rates
            assert (rates.full, rates.adapter) == (float(full), float(adapter)), name
            listed.add(name)
    assert listed == set(LOSSES) - MIXTURES


def test_the_arguments_are_as_it_says(tmp_path: Path) -> None:
    args = PreferenceTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.num_train_epochs, args.lr_scheduler_type, args.warmup_steps) == (1, "cosine", 0.1)
    assert args.max_tokens_per_micro_batch == "auto"
    coupled = {name for name in set(LOSSES) - MIXTURES if make_loss(name).couples_groups}
    named = re.search(r"groups of a micro-batch \(([^)]*)\)", PAGE)
    assert named is not None
    assert coupled == set(re.findall(r"`(\w+)`", named[1]))

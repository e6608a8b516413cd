"""Run under torchrun by test_trl_distributed: one of the trainers on this rank's share, its losses written down."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import trl
import trl_runs
from two_processes import leave_together

from kvpref.integrations import trl as kvpref_trl


def main(path: str, output: str) -> None:
    rank, losses = os.environ["RANK"], {}
    for name, trainer_class in (("trl", trl.DPOTrainer), ("kvpref", kvpref_trl.DPOTrainer)):
        trainer = trainer_class(
            model=path,
            args=trl_runs.make_args(trl.DPOConfig, Path(output), beta=0.5, per_device_train_batch_size=2),
            train_dataset=trl_runs.pairs(),
            processing_class=trl_runs.make_tokenizer(),
        )
        losses[name] = trl_runs.run(trainer).losses
    Path(output, f"losses-{rank}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_together()

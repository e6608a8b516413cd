"""What the progress bar says at the end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from kvpref.data.statistics import TOKEN_SAVING
from kvpref.training.callbacks import ThroughputProgressCallback
from kvpref.training.meters import TokenMeter


@pytest.mark.parametrize("is_main", [True, False])
def test_the_saving_is_explained_once_in_the_words_of_inspect(is_main: bool, capsys) -> None:
    meter = TokenMeter()
    meter.add(SimpleNamespace(num_groups=1, num_total_tokens=6), 4, 5)  # type: ignore[arg-type]
    state: Any = TrainerState(is_world_process_zero=is_main, is_local_process_zero=is_main)
    callback = ThroughputProgressCallback(meter)
    callback.on_train_begin(None, state, TrainerControl())  # type: ignore[arg-type]
    callback.on_train_end(None, state, TrainerControl())  # type: ignore[arg-type]
    assert (f"1.20x token saving: {TOKEN_SAVING}" in capsys.readouterr().err) == is_main

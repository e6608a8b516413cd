"""Deep models extended from shallow ones, against whole runs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_models import tiny_config

from kvpref.engine.options import EngineOptions
from kvpref.profiling.prediction.depth import SHALLOW, extend
from kvpref.profiling.prediction.model import TrainingSetup, build_fake_training, layers_repeat
from kvpref.profiling.prediction.step import GroupShape, Moment, trace_step

NUM_LAYERS = 7
SHAPE = GroupShape(prompt_tokens=70, response_tokens=30, num_responses=3)
VARIANTS = {
    "full": EngineOptions(),
    "packed": EngineOptions(mode="packed"),
    "padded": EngineOptions(mode="padded"),
    "checkpoint prefix": EngineOptions(checkpoint="prefix"),
    "checkpoint all": EngineOptions(checkpoint="all"),
    "bounded": EngineOptions(schedule="bounded", max_tokens_per_chunk=64),
    "bounded, checkpoint all": EngineOptions(schedule="bounded", max_tokens_per_chunk=64, checkpoint="all"),
}
SETUPS = {
    "full fine-tuning": TrainingSetup(),
    "lora": TrainingSetup(lora_r=4),
    "mixed precision": TrainingSetup(dtype=torch.float32, mixed_precision=torch.bfloat16, optimizer="sgd_momentum"),
}


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("variant", "setup"),
    [
        *((variant, "full fine-tuning") for variant in ("packed", "padded", "checkpoint prefix")),
        ("full", "mixed precision"),
        # Whole runs of seven layers take up to half a minute each.
        *(
            pytest.param(variant, setup, marks=pytest.mark.full)
            for variant, setup in (
                *(
                    (variant, "full fine-tuning")
                    for variant in ("full", "checkpoint all", "bounded, checkpoint all", "bounded")
                ),
                *(("full", "lora"), ("bounded", "lora"), ("bounded", "mixed precision")),
            )
        ),
    ],
)
def test_extended_peak_is_that_of_a_whole_run(variant: str, setup: str) -> None:
    if setup == "lora":
        pytest.importorskip("peft")
    config = tiny_config("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=NUM_LAYERS)
    assert layers_repeat(config)

    def trace(num_layers: int) -> list[Moment]:
        training = build_fake_training(config, SETUPS[setup], num_layers)
        options = VARIANTS[variant]
        return trace_step(training, SHAPE.batch(1, ragged=options.mode == "padded"), options, "cuda")

    extended = extend(trace(SHALLOW), trace(SHALLOW + 1), NUM_LAYERS)
    assert extended is not None
    whole = trace(NUM_LAYERS)
    assert highest(extended).total_bytes == highest(whole).total_bytes
    assert highest(extended).bytes_by_category == highest(whole).bytes_by_category
    assert extended[0].bytes_by_category == whole[0].bytes_by_category


def highest(trace: Sequence[Moment]) -> Moment:
    return max(trace, key=lambda moment: moment.total_bytes)


def moments(operators: str) -> list[Moment]:
    return [Moment(name, None, index, {}) for index, name in enumerate(operators)]


def test_repeated_blocks_are_found_wherever_they_are() -> None:
    """Two runs of layers in one stretch: blocks `abc` and `de`."""
    traces = [moments("x" + "abc" * layers + "y" + "de" * layers + "z") for layers in (SHALLOW, SHALLOW + 1)]
    extended = extend(*traces, 9)
    assert extended is not None
    # The index of each operator stands for bytes: every layer adds three before y, and three and two before z.
    by_operator = {moment.operator: moment.total_bytes for moment in extended if moment.operator in "xyz"}
    assert by_operator == {"x": 0, "y": 1 + 3 * 9, "z": 2 + 5 * 9}


@pytest.mark.parametrize("longer", ["xabababaQy", "xababababaky", "xabc"])
def test_other_differences_are_refused(longer: str) -> None:
    assert extend(moments("xababababy"), moments(longer), 9) is None


def test_layers_that_differ_are_noticed() -> None:
    assert not layers_repeat(tiny_config("smollm3"))  # every second layer has no rotary embedding

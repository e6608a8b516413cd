"""bf16 autocast of measured steps."""

from __future__ import annotations

import torch
from tiny_models import tiny_model

import kvpref
from kvpref.losses import SFT
from kvpref.profiling.compare.modes import compare_modes
from kvpref.profiling.precision import compute_dtype, use_autocast
from kvpref.profiling.timing import TimingOptions


def log_probs(model: torch.nn.Module) -> torch.Tensor:
    groups = [kvpref.Group([kvpref.Sequence.from_prompt_and_response([1, 2, 3], [4, 5])])]
    return kvpref.response_logps(model, kvpref.collate(groups)).token_logps


def test_the_forward_runs_in_bf16_and_the_weights_stay() -> None:
    model = kvpref.attach(tiny_model("qwen3"))
    exact = log_probs(model)
    use_autocast(model, None)
    assert torch.cuda.is_available() or torch.equal(log_probs(model), exact)
    use_autocast(model, False)
    assert compute_dtype(model) == torch.float32
    use_autocast(model, True)
    assert compute_dtype(model) == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    rounded = log_probs(model)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    # bf16 keeps eight bits; log-probs of a small vocabulary are a few nats.
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)
    rounded.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_the_modes_of_a_step_are_compared_as_16_bits_are() -> None:
    pair = [kvpref.Sequence.from_prompt_and_response([1, 2, 3], [4 + index, 5]) for index in range(2)]
    groups = [kvpref.Group(pair, labels=[True, False])]
    model = kvpref.attach(tiny_model("qwen3"))
    use_autocast(model, True)
    found = compare_modes(
        model, {"two_pass": [groups], "packed": [groups]}, SFT(), options=TimingOptions(num_rounds=1, num_warmup=0)
    )
    assert not found.different

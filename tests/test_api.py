"""The public API as documented, on a tiny Qwen3, against the naive forward of each sequence alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import kvpref

# float32: two orders of summation over some hundred terms.
TOLERANCE = 1e-5


def make_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=89,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
        )
    )


def make_groups() -> list[kvpref.Group]:
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> list[int]:
        return torch.randint(89, (length,), generator=generator).tolist()

    groups = []
    for _ in range(3):
        prompt = draw(20)
        groups.append(
            kvpref.Group([kvpref.Sequence.from_prompt_and_response(prompt, draw(length)) for length in (5, 8)])
        )
    return groups


def naive_logps(model: Qwen3ForCausalLM, groups: list[kvpref.Group]) -> torch.Tensor:
    logps = []
    for sequence in (sequence for group in groups for sequence in group.sequences):
        input_ids = torch.tensor([sequence.input_ids])
        scores = model(input_ids=input_ids).logits[0].log_softmax(-1)
        logps += [
            scores[position - 1, token]
            for position, (token, scored) in enumerate(zip(sequence.input_ids, sequence.scored, strict=True))
            if scored
        ]
    return torch.stack(logps)


def gradients(model: torch.nn.Module, logps: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1.0, 2.0, len(logps))
    return list(torch.autograd.grad((logps * weights).sum(), list(model.parameters())))


@pytest.mark.parametrize("how", ["two calls", "one call"])
def test_logps_and_gradients_equal_the_naive_forward(how: str) -> None:
    groups = make_groups()
    expected = naive_logps(make_model(), groups)
    model = kvpref.attach(make_model())
    batch = kvpref.collate(groups)
    if how == "two calls":
        cache = kvpref.encode_prefix(model, batch)
        logps = kvpref.score_responses(model, batch, cache)
    else:
        logps = kvpref.response_logps(model, batch, mode="two_pass")
    assert isinstance(logps, kvpref.ResponseLogps)
    assert logps.token_logps.dtype == torch.float32
    assert logps.cu_seqlens.tolist() == [0, 5, 13, 18, 26, 31, 39]
    assert logps.group_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert (logps.token_logps - expected).abs().max() < TOLERANCE
    reference = make_model()
    for grad, naive in zip(
        gradients(model, logps.token_logps), gradients(reference, naive_logps(reference, groups)), strict=True
    ):
        assert (grad - naive).norm() < TOLERANCE * naive.norm().clamp(min=1.0)


def test_forward_backward_adds_the_gradient_of_the_loss() -> None:
    def loss(policy: kvpref.ResponseLogps, reference: None, batch: kvpref.Batch) -> kvpref.LossOutput:
        return kvpref.LossOutput(-policy.sum().pow(2).mean() / 100, {"mean": policy.mean().mean().detach()})

    model = kvpref.attach(make_model())
    output = kvpref.forward_backward(model, kvpref.collate(make_groups()), loss)
    reference = make_model()
    policy = naive_logps(reference, make_groups())
    sums = torch.stack([part.sum() for part in policy.split([5, 8] * 3)])
    expected = -sums.pow(2).mean() / 100
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=TOLERANCE)
    assert set(output.metrics) == {"mean"}
    for parameter, naive in zip(model.parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None
        assert naive.grad is not None
        assert (parameter.grad - naive.grad).norm() < TOLERANCE * naive.grad.norm().clamp(min=1.0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda policy: "a loss", "must return a kvpref.LossOutput, or a scalar tensor; it returned str"),
        (lambda policy: kvpref.LossOutput(policy.sum(), {}), "must return a scalar tensor"),
        (lambda policy: kvpref.LossOutput(policy.sum().mean().detach(), {}), "a loss without gradient"),
    ],
)
def test_a_wrong_loss_is_named(bad: object, message: str) -> None:
    def my_loss(policy: kvpref.ResponseLogps, reference: None, batch: kvpref.Batch) -> object:
        return bad(policy)  # type: ignore[operator]

    model = kvpref.attach(make_model())
    with pytest.raises(kvpref.InputError, match=f"loss 'my_loss'.*{message}"):
        kvpref.forward_backward(model, kvpref.collate(make_groups()), my_loss)  # type: ignore[arg-type]


def test_forward_backward_refuses_unknown_schedules() -> None:
    model = kvpref.attach(make_model())
    with pytest.raises(kvpref.InputError, match="unknown schedule 'lazy'; choose from: full"):
        kvpref.forward_backward(model, kvpref.collate(make_groups()), lambda *_: None, schedule="lazy")


def test_every_public_name_is_there() -> None:
    code = "import kvpref as k; [getattr(k, name) for name in k.__all__]; print(sorted(k.__all__) == k.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = kvpref.nope

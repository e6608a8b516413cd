"""Mixtures of experts, with and without their load-balancing loss, against each sequence alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from sample_groups import SCENARIOS
from tiny_experts import BALANCED, CONFIGS, known_families, tiny_experts
from tiny_models import tiny_model
from torch import nn

import kvpref
from kvpref import Batch, Group, InputError, UnsupportedModelError
from kvpref.engine.options import EngineOptions
from kvpref.engine.schedules import forward_backward_step
from kvpref.plan.modes import MODES
from kvpref.plan.step import join_batches

COEFFICIENT = 0.7  # as large as the rest, or a wrong gradient would hide
TOLERANCE = 1e-10  # float64 sums in another order; 1e-14 measured
FP32_TOLERANCE = 2e-5  # rounding of 6e-8 amplified by two layers and a softmax; 3e-6 measured
_TELLING = ("identical_responses", "shared_system_prompt", "nested_responses")
OPTIONS: dict[str, dict[str, Any]] = {
    **{mode: {"mode": mode} for mode in MODES},
    "checkpointed": {"checkpoint": "all"},
    "bounded": {"schedule": "bounded", "max_tokens_per_chunk": 4},
    "bounded whole": {"schedule": "bounded", "checkpoint": "all"},
}


@pytest.fixture(autouse=True)
def _known_families() -> Iterator[None]:
    with known_families():
        yield


class Truth(NamedTuple):
    result: oracle.Result
    balance_loss: float


def naive_balance_loss(model: nn.Module, groups: list[Group]) -> torch.Tensor:
    """The loss over the router logits of all sequences, each of which ran alone."""
    found = []
    for sequence in (sequence for group in groups for sequence in group.sequences):
        ids = torch.tensor([sequence.input_ids])
        found.append(model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits)
    layers = tuple(torch.cat(layer) for layer in zip(*found, strict=True))
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    own = function(layers, model.num_experts, model.num_experts_per_tok)
    # The same in the layers' precision throughout: transformers' adds up the experts' shares in float32.
    weights = torch.cat(layers).softmax(-1)
    chosen = torch.zeros_like(weights).scatter_(1, weights.topk(model.num_experts_per_tok).indices, 1.0)
    loss = model.num_experts * (chosen.mean(0) * weights.mean(0)).sum()
    assert loss.item() == pytest.approx(own.item(), rel=1e-6)
    return loss


def run_naive(model: nn.Module, groups: list[Group], coefficient: float = COEFFICIENT) -> Truth:
    model.zero_grad(set_to_none=True)
    with oracle.precision(model):
        logps = oracle.naive_token_logps(model, groups)
        balance_loss = naive_balance_loss(model, groups)
        ((logps * oracle.loss_weights(groups).to(logps)).sum() + coefficient * balance_loss).backward()
    return Truth(oracle.Result(logps.detach(), oracle.grads_of(model)), balance_loss.item())


@functools.cache
def truth(name: str, scenario: str) -> Truth:
    return run_naive(tiny_experts(name), SCENARIOS[scenario]())


def run(model: nn.Module, batch: Batch, **options: Any) -> tuple[oracle.Result, kvpref.LossOutput]:
    seen: list[torch.Tensor] = []

    def spying(policy: kvpref.ResponseLogps, reference: Any, batch: Batch) -> kvpref.LossOutput:
        seen.append(policy.token_logps.detach())
        return oracle.weighted_loss(policy, reference, batch)

    model.zero_grad(set_to_none=True)
    with oracle.precision(model):
        output = kvpref.forward_backward(model, batch, spying, router_aux_loss_coef=COEFFICIENT, **options)
    return oracle.Result(seen[0], oracle.grads_of(model)), output


def assert_balanced(model: nn.Module, scenario: str, expected: Truth, tolerance: float, **options: Any) -> None:
    batch = kvpref.collate(SCENARIOS[scenario](), min_shared_tokens=1)
    found, output = run(model, batch, **options)
    oracle.assert_same(found, expected.result, tolerance)
    assert output.metrics["router_aux_loss"].item() == pytest.approx(expected.balance_loss, rel=tolerance)
    plain = oracle.weighted_loss(kvpref.ResponseLogps(found.token_logps, *[batch.group_index] * 2), None, batch).loss
    total = plain.item() + COEFFICIENT * expected.balance_loss
    assert output.loss.item() == pytest.approx(total, rel=1e-4 if tolerance > 1e-8 else 1e-9)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_mode_and_schedule(options: dict[str, Any]) -> None:
    model = kvpref.attach(tiny_experts("mixtral"))
    assert_balanced(model, "five_levels", truth("mixtral", "five_levels"), TOLERANCE, **options)


@pytest.mark.parametrize(
    "scenario",
    [
        name if name in _TELLING else pytest.param(name, marks=pytest.mark.full)
        for name in SCENARIOS
        if name != "five_levels"
    ],
)
@pytest.mark.parametrize("options", [OPTIONS["two_pass"], OPTIONS["bounded"]], ids=["two_pass", "bounded"])
def test_scenarios(scenario: str, options: dict[str, Any]) -> None:
    model = kvpref.attach(tiny_experts("qwen3_moe"))
    assert_balanced(model, scenario, truth("qwen3_moe", scenario), TOLERANCE, **options)


@pytest.mark.parametrize("name", BALANCED)
@pytest.mark.parametrize("schedule", ["full", "bounded"])
def test_families(name: str, schedule: str) -> None:
    model = kvpref.attach(tiny_experts(name))
    assert_balanced(model, "pairs", truth(name, "pairs"), TOLERANCE, schedule=schedule)


@pytest.mark.parametrize("schedule", ["full", "bounded"])
def test_the_experts_kernel_that_transformers_prefers(schedule: str) -> None:
    """Grouped products, in float32: the only type that the CPU's know."""
    model = tiny_experts("qwen3_moe", torch.float32)
    assert model.config._experts_implementation == "grouped_mm"
    expected = run_naive(oracle.twin(model), SCENARIOS["pairs"]())
    assert_balanced(kvpref.attach(model), "pairs", expected, FP32_TOLERANCE, schedule=schedule)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_the_loss_experts_are_exact_as_they_are(name: str) -> None:
    groups = SCENARIOS["five_levels"]()
    expected = oracle.naive(tiny_experts(name), groups)
    batch = kvpref.collate(groups, min_shared_tokens=1)
    oracle.assert_same(oracle.shared(kvpref.attach(tiny_experts(name)), batch), expected, TOLERANCE)


def test_the_padded_forward_of_transformers_gives_the_same_loss() -> None:
    """What `output_router_logits` adds in transformers' and TRL's training, whose rows are padded."""
    groups = SCENARIOS["pairs"]()
    sequences = [torch.tensor(sequence.input_ids) for group in groups for sequence in group.sequences]
    rows = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True)
    with torch.no_grad(), oracle.true_float64():
        outputs = tiny_experts("mixtral")(input_ids=rows, attention_mask=mask, output_router_logits=True)
    assert outputs.aux_loss.item() == pytest.approx(truth("mixtral", "pairs").balance_loss, rel=1e-6)


def test_micro_batches_of_a_step_have_losses_of_their_own() -> None:
    """One shares its prompt with the other, so the prompt's tokens count in both losses."""
    groups = SCENARIOS["pairs"]()
    parts = [groups[:1], groups[:1] + groups[1:]]
    weights = [0.3, 1.7]
    model = tiny_experts("mixtral")
    expected: dict[str, torch.Tensor] = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, grad in run_naive(model, part).result.grads.items():
            expected[name] = expected.get(name, 0) + weight * grad
    options = EngineOptions(schedule="bounded", max_tokens_per_chunk=5, router_aux_loss_coef=COEFFICIENT)
    batches = [kvpref.collate(part, min_shared_tokens=1) for part in parts]
    step = join_batches(batches, max_tokens_per_chunk=5)
    assert any(len(chunk.occurrences.owners) == 2 for chunk in step.chunks.shared)
    model = kvpref.attach(tiny_experts("mixtral"))
    with oracle.true_float64():
        outputs = forward_backward_step(
            model,
            step,
            oracle.weighted_loss,
            options,
            references=[None, None],
            backward=lambda loss, index: (loss * weights[index]).backward(),
        )
    for output, part in zip(outputs, parts, strict=True):
        truth_loss = run_naive(tiny_experts("mixtral"), part).balance_loss
        assert output.metrics["router_aux_loss"].item() == pytest.approx(truth_loss, rel=1e-9)
    for name, grad in oracle.grads_of(model).items():
        assert oracle.relative_error(grad, expected[name]) <= TOLERANCE, name


def test_a_model_without_experts_has_no_such_loss() -> None:
    batch = kvpref.collate(SCENARIOS["pairs"]())
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM returns no router logits"):
        run(kvpref.attach(tiny_model("llama", torch.float64)), batch)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_a_model_that_balances_without_a_loss_has_none(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="has no load-balancing loss that kvpref knows"):
        run(kvpref.attach(tiny_experts(name)), kvpref.collate(SCENARIOS["pairs"]()))


def test_a_loss_that_is_another_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kvpref.attach(tiny_experts("mixtral"))
    module = sys.modules["transformers.models.mixtral.modeling_mixtral"]
    own = module.load_balancing_loss_func
    monkeypatch.setattr(module, "load_balancing_loss_func", lambda *args, **kwargs: 2 * own(*args, **kwargs))
    with pytest.raises(UnsupportedModelError, match="no load-balancing loss that kvpref knows"):
        run(model, kvpref.collate(SCENARIOS["pairs"]()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_aux_loss_coef": -0.1}, r"at least 0; got -0\.1"),
        ({"router_aux_loss_coef": float("nan")}, "at least 0; got nan"),
        ({"router_aux_loss_coef": 0.1, "prefix_grad": False}, "prefix_grad=False leaves prompts without gradient"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EngineOptions(**options)


def test_compiled_layers_are_refused() -> None:
    model = kvpref.compile_layers(kvpref.attach(tiny_experts("mixtral")))
    with pytest.raises(UnsupportedModelError, match="compiled layers do not return"):
        run(model, kvpref.collate(SCENARIOS["pairs"]()))


@pytest.mark.parametrize("name", ["phimoe", "minimax_m2"])
def test_routers_that_are_random_in_training_are_refused(name: str) -> None:
    model = kvpref.attach(tiny_experts(name, router_jitter_noise=0.01).train())
    batch = kvpref.collate(SCENARIOS["pairs"]())
    with pytest.raises(UnsupportedModelError, match=r"two forwards of one token differ"):
        kvpref.response_logps(model, batch)
    kvpref.response_logps(model.eval(), batch)

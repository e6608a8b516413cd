"""Training steps in several modes: what they compute, and that a wrong mode is not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sample_groups import tokens
from tiny_models import tiny_model

import kvpref
from kvpref import Group, LossOutput
from kvpref.engine.options import EngineOptions
from kvpref.losses import DPO, SFT
from kvpref.plan.flops import Work
from kvpref.profiling import steps
from kvpref.profiling.compare.modes import Cut, compare_modes, find_differences, step_case
from kvpref.profiling.steps import StepOutcome, TrainStep, make_micro_batches
from kvpref.profiling.timing import TimingOptions

CPU = torch.device("cpu")
ONE_ROUND = TimingOptions(num_rounds=1, num_warmup=0)


def make_pairs(count: int) -> list[Group]:
    """Pairs of different lengths whose answers differ from their first token on."""
    groups = []
    for index in range(count):
        prompt = tokens(20 + index, 10 * index)
        answers = [[3 + answer, *tokens(2 + answer + index, 10 * index + 1 + answer)] for answer in range(2)]
        sequences = [kvpref.Sequence.from_prompt_and_response(prompt, answer) for answer in answers]
        groups.append(Group(sequences, labels=[True, False], id=f"pair {index}"))
    return groups


def cut(groups: list[Group], size: int) -> list[list[Group]]:
    return [groups[start : start + size] for start in range(0, len(groups), size)]


@pytest.mark.parametrize(("size", "mode"), [(5, "two_pass"), (3, "packed"), (1, "padded")])
def test_a_step_does_not_depend_on_the_cut_or_the_mode(size: int, mode: str) -> None:
    """SFT is a mean over tokens, so weights by groups instead of tokens would show. fp64: rounding only."""
    groups, loss = make_pairs(5), SFT()
    model = kvpref.attach(tiny_model("llama", torch.float64))
    whole = kvpref.forward_backward(model, kvpref.collate(groups), loss, mode="packed").loss.item()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    step = TrainStep(model, loss, make_micro_batches(model, cut(groups, size), loss, mode=mode, device=CPU), mode)
    assert step.check().loss == pytest.approx(whole, rel=1e-10)
    assert step.run().item() == pytest.approx(whole, rel=1e-10)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert torch.allclose(parameter.grad, grad, rtol=1e-8, atol=1e-12)


def test_the_check_tells_the_mean_log_prob() -> None:
    groups, loss = make_pairs(3), SFT()
    model = kvpref.attach(tiny_model("llama", torch.float64))
    logps = kvpref.response_logps(model, kvpref.collate(groups), mode="padded").token_logps
    step = TrainStep(
        model, loss, make_micro_batches(model, cut(groups, 2), loss, mode="two_pass", device=CPU), "two_pass"
    )
    assert step.check().mean_token_logp == pytest.approx(logps.mean().item(), rel=1e-10)


def test_only_an_optimizer_changes_the_weights() -> None:
    groups, loss = make_pairs(2), DPO()
    model = kvpref.attach(tiny_model("llama", torch.float64))
    micro_batches = make_micro_batches(model, [groups], loss, mode="two_pass", device=CPU)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    TrainStep(model, loss, micro_batches, "two_pass").run()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TrainStep(model, loss, micro_batches, "two_pass", optimizer).run()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_modes_are_set_beside_their_ideals() -> None:
    groups = make_pairs(4)
    model = kvpref.attach(tiny_model("llama", torch.float32))
    cuts: dict[str, Cut] = {"two_pass": [groups], "packed": cut(groups, 2), "padded": cut(groups, 1)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    result = compare_modes(model, cuts, DPO(), optimizer=optimizer, options=ONE_ROUND)
    assert result.different == {}
    by_name = {item.name: item for item in result.results}
    assert list(by_name) == list(cuts)
    assert by_name["two_pass"].ideal > 1 == by_name["packed"].ideal
    assert by_name["padded"].ideal < 1
    total = sum(len(sequence) for group in groups for sequence in group.sequences)
    for mode, cut_of_mode in cuts.items():
        facts = by_name[mode].facts
        assert facts["num_micro_batches"] == len(cut_of_mode)
        assert facts["total_tokens"] == total
        assert facts["unique_tokens"] == total - sum(20 + index for index in range(4))
    assert by_name["two_pass"].facts["forward_tokens"] == by_name["two_pass"].facts["unique_tokens"]
    assert by_name["packed"].facts["forward_tokens"] == total


def test_work_of_a_step_is_that_of_its_micro_batches() -> None:
    groups, loss = make_pairs(2), SFT()
    model = kvpref.attach(tiny_model("llama", torch.float32))
    step = TrainStep(model, loss, make_micro_batches(model, cut(groups, 1), loss, mode="packed", device=CPU), "packed")
    lengths = [len(sequence) for group in groups for sequence in group.sequences]
    num_scored = sum(sum(sequence.scored) for group in groups for sequence in group.sequences)
    assert step.work() == Work(sum(lengths), sum(n * (n + 1) // 2 for n in lengths), num_scored)
    assert step_case(step).facts["attention_pairs"] == step.work().num_pairs


def test_a_mode_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = steps.forward_backward

    def broken(model: Any, batch: Any, loss: Any, options: EngineOptions, **kwargs: Any) -> LossOutput:
        calls.append(options.mode)
        output = real(model, batch, loss, options, **kwargs)
        return output._replace(loss=output.loss + 0.01) if options.mode == "one_pass" else output

    monkeypatch.setattr(steps, "forward_backward", broken)
    groups = make_pairs(2)
    model = kvpref.attach(tiny_model("llama", torch.float32))
    result = compare_modes(
        model, {mode: [groups] for mode in ("one_pass", "packed", "two_pass")}, DPO(), options=ONE_ROUND
    )
    assert [item.name for item in result.results] == ["packed", "two_pass"]
    assert list(result.different) == ["one_pass"]
    assert "loss is 0.70" in result.different["one_pass"]
    assert calls.count("one_pass") == 1


@pytest.mark.parametrize("wrong", [StepOutcome(0.7, -2.1), StepOutcome(0.8, -2.0), StepOutcome(float("nan"), -2.0)])
def test_differences_of_loss_and_log_prob_count(wrong: StepOutcome) -> None:
    outcomes = {"packed": StepOutcome(0.7, -2.0), "two_pass": StepOutcome(0.70001, -2.0001), "padded": wrong}
    assert list(find_differences(outcomes, StepOutcome(1e-4, 1e-4))) == ["padded"]


def test_the_baseline_is_needed() -> None:
    model = kvpref.attach(tiny_model("llama", torch.float32))
    with pytest.raises(ValueError, match="compared with 'packed'"):
        compare_modes(model, {"two_pass": [make_pairs(1)]}, SFT())

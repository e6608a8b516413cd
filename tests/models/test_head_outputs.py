"""What the head computes besides log-probs, against full logits of each sequence alone: values and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import odd_heads
import oracle
import pytest
import torch
from oracle_outputs import naive_outputs
from sample_groups import SCENARIOS
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import kvpref
from kvpref import Batch, Group, HeadOptions, LossOutput, ResponseLogps
from kvpref.models import own_head
from kvpref.models.head_form import head_form
from kvpref.plan.modes import MODES
from kvpref.records.outputs import WITHOUT_GRAD

TOLERANCE = 1e-10  # float64 sums in another order; 1e-14 measured
IDS = (7, 3, 90)
EVERYTHING: dict[str, Any] = {
    "temperature": 0.7,
    "entropy": True,
    "collision": True,
    "mean_logits": True,
    "hidden": True,
    "values": True,
    "logit_ids": IDS,
}
FIELDS = ("token_logps", "entropy", "collision", "mean_logits", "hidden", "values", "logits")
OPTIONS: dict[str, dict[str, Any]] = {
    **{mode: {"mode": mode} for mode in MODES},
    "bounded": {"schedule": "bounded", "max_tokens_per_chunk": 4},
    "checkpointed": {"schedule": "bounded", "checkpoint": "all"},
}


def make_model(family: str = "llama") -> PreTrainedModel:
    return give_value_head(tiny_model(family, torch.float64))


def give_value_head(model: PreTrainedModel) -> PreTrainedModel:
    head = kvpref.add_value_head(model)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, head.in_features))
        head.bias.fill_(0.3)
    return model


def coupled(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A sum with random weights of everything, and a square, so that nothing cancels."""
    total = torch.zeros((), dtype=torch.float64)
    for seed, (name, values) in enumerate(outputs.items()):
        weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        total = total + (values * weights).sum() + (values.square().mean() if name == "entropy" else 0)
    return total


def naive(model: PreTrainedModel, groups: list[Group]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    with oracle.precision(model):
        outputs = naive_outputs(model, kvpref.collate(groups), HeadOptions(**EVERYTHING))
        outputs = {name: outputs[name] for name in FIELDS}
        coupled(outputs).backward()
    return {name: values.detach() for name, values in outputs.items()}, oracle.grads_of(model)


def run(model: PreTrainedModel, groups: list[Group], **options: Any) -> tuple[Any, Any]:
    seen: list[dict[str, torch.Tensor]] = []

    @kvpref.loss(**EVERYTHING)
    def everything(policy: ResponseLogps, reference: None, batch: Batch) -> LossOutput:
        outputs = {name: getattr(policy, name) for name in FIELDS}
        assert all(values.requires_grad == (name not in WITHOUT_GRAD) for name, values in outputs.items())
        seen.append({name: values.detach() for name, values in outputs.items()})
        return LossOutput(coupled(outputs), {})

    model.zero_grad(set_to_none=True)
    with oracle.precision(model):
        kvpref.forward_backward(model, kvpref.collate(groups, min_shared_tokens=1), everything, **options)
    return seen[0], oracle.grads_of(model)


def assert_same(found: tuple[Any, Any], truth: tuple[Any, Any]) -> None:
    for one, other in zip(found, truth, strict=True):
        assert one.keys() == other.keys()
        for name in other:
            assert oracle.relative_error(one[name], other[name]) <= TOLERANCE, name


@pytest.mark.parametrize("scenario", ["pairs", "story_questions_answers", "different_scoring", "nested_responses"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scenarios(scenario: str, options: dict[str, Any]) -> None:
    groups = SCENARIOS[scenario]()
    model = make_model()
    truth = naive(model, groups)
    assert_same(run(kvpref.attach(model), groups, **options), truth)


@pytest.mark.parametrize("family", ["granite", "qwen2", "gpt2", "stablelm"])
@pytest.mark.parametrize("schedule", ["full", "bounded"])
def test_families_with_scaled_and_tied_heads(family: str, schedule: str) -> None:
    groups = SCENARIOS["pairs"]()
    model = make_model(family)
    truth = naive(model, groups)
    assert_same(run(kvpref.attach(model), groups, schedule=schedule), truth)


@pytest.mark.parametrize("change", [odd_heads.softcapped, odd_heads.normed])
@pytest.mark.parametrize("options", [{"mode": "one_pass"}, OPTIONS["bounded"], OPTIONS["checkpointed"]], ids=str)
def test_heads_of_no_known_form(
    change: odd_heads.Change, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own forward makes their logits, here of two rows at once."""
    monkeypatch.setitem(own_head._PIECE_BYTES, "cpu", 2 * 4 * VOCAB_SIZE)
    groups = SCENARIOS["story_questions_answers"]()
    model = give_value_head(odd_heads.with_logits(change))
    truth = naive(model, groups)
    assert_same(run(kvpref.attach(model), groups, **options), truth)


@pytest.mark.parametrize("options", [{"mode": "two_pass"}, OPTIONS["bounded"]], ids=str)
def test_heads_with_a_softcap(options: dict[str, Any]) -> None:
    groups = SCENARIOS["story_questions_answers"]()
    model = give_value_head(odd_heads.with_logits(odd_heads.softcapped))
    model.config.final_logit_softcapping = 2.0
    truth = naive(model, groups)
    assert head_form(kvpref.attach(model)).softcap == 2.0
    assert_same(run(model, groups, **options), truth)


def test_two_passes_by_hand() -> None:
    model = kvpref.attach(make_model())
    batch = kvpref.collate(SCENARIOS["pairs"](), min_shared_tokens=1)
    head = HeadOptions(**EVERYTHING)
    whole = kvpref.response_logps(model, batch, head=head)
    parts = kvpref.score_responses(model, batch, kvpref.encode_prefix(model, batch), head=head)
    for name in FIELDS:
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name


def test_only_what_is_asked_for() -> None:
    model = kvpref.attach(make_model())
    logps = kvpref.response_logps(model, kvpref.collate(SCENARIOS["pairs"]()), head=HeadOptions(entropy=True))
    assert logps.entropy is not None
    assert all(getattr(logps, name) is None for name in ("collision", "mean_logits", "hidden", "values", "logits"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive; got 0.0"),
        ({"entropies": True}, "kvpref.loss has no setting 'entropies'; it has: .*entropy"),
        ({"reads": "middles"}, "unknown reads 'middles'; choose from: tokens, ends"),
    ],
)
def test_wrong_declarations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(kvpref.InputError, match=message):
        kvpref.loss(**options)


def test_what_the_model_lacks_is_refused() -> None:
    batch = kvpref.collate(SCENARIOS["pairs"]())
    with pytest.raises(kvpref.InputError, match=r"no value head; call kvpref.add_value_head"):
        kvpref.response_logps(kvpref.attach(tiny_model("llama")), batch, head=HeadOptions(values=True))
    with pytest.raises(kvpref.InputError, match=r"logit_ids must lie in \[0, 101\).*got \(101,\)"):
        kvpref.response_logps(kvpref.attach(tiny_model("llama")), batch, head=HeadOptions(logit_ids=(101,)))
    with pytest.raises(kvpref.InputError, match="has a value_head already"):
        kvpref.add_value_head(make_model())


def test_value_heads_are_saved_with_the_model(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    head = kvpref.add_value_head(loaded, tmp_path)
    assert torch.equal(head.weight, model.value_head.weight)
    assert torch.equal(head.bias, model.value_head.bias)
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(kvpref.InputError, match="plain: holds no value_head that fits"):
        kvpref.add_value_head(tiny_model("llama"), tmp_path / "plain")


def test_peft_keeps_the_trained_copy_of_the_value_head() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["value_head"])
    adapted = kvpref.attach(peft.get_peft_model(make_model(), config))
    batch = kvpref.collate(SCENARIOS["pairs"]())
    values = kvpref.response_logps(adapted, batch, head=HeadOptions(values=True)).values
    assert values is not None
    values.sum().backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert any("modules_to_save" in name and "value_head" in name for name in trained)

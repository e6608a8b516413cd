"""`attach` leaves everything else about a model as it was."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import oracle
import pytest
import torch
from sample_groups import pairs
from tiny_models import VARIANTS, build_model, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import kvpref
from kvpref import InputError

# Only the order of additions differs; see test_exactness.
FP64_TOLERANCE = 1e-10


def score(model: nn.Module) -> torch.Tensor:
    return kvpref.response_logps(model, kvpref.collate(pairs(), min_shared_tokens=1)).token_logps


def padded_inputs() -> dict[str, torch.Tensor]:
    """Three rows, one padded on the left, one on the right."""
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, :2] = 0
    mask[2, 4:] = 0
    return {"input_ids": torch.arange(18).view(3, 6) % 90 + 5, "attention_mask": mask}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ordinary_padded_forward_stays_that_of_sdpa(variant: str) -> None:
    """transformers builds no mask at all for attention names that it does not know, which would lose the padding."""
    model = tiny_model(variant).eval()
    before = oracle.twin(model)
    before.set_attn_implementation("sdpa")
    kvpref.attach(model)
    inputs = padded_inputs()
    real = inputs["attention_mask"].bool()
    assert torch.equal(model(**inputs).logits[real], before(**inputs).logits[real])
    assert torch.equal(model(inputs["input_ids"]).logits, before(inputs["input_ids"]).logits)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "stablelm"])
def test_generate_works_after_attach(variant: str) -> None:
    model = tiny_model(variant).eval()
    before = oracle.twin(model)
    before.set_attn_implementation("sdpa")
    kvpref.attach(model)
    inputs = {name: tensor[:2] for name, tensor in padded_inputs().items()}
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(**inputs, **arguments), before.generate(**inputs, **arguments))


def test_ordinary_training_step_after_attach() -> None:
    model = tiny_model("llama", torch.float64)
    before = oracle.twin(model)
    kvpref.attach(model)
    ids = torch.arange(12).view(2, 6) + 5
    for each in (model, before):
        with oracle.true_float64():
            each(input_ids=ids, labels=ids).loss.backward()
    oracle.assert_same(
        oracle.Result(torch.zeros(0), oracle.grads_of(model)),
        oracle.Result(torch.zeros(0), oracle.grads_of(before)),
        FP64_TOLERANCE,
    )


def test_attach_is_idempotent_and_returns_the_model() -> None:
    model = tiny_model("llama")
    assert kvpref.attach(model) is model
    first, forward, config = score(model), model.forward, model.config
    assert kvpref.attach(model) is model
    assert model.forward == forward
    assert model.config is config
    assert torch.equal(score(model), first)


def test_not_attached_is_refused() -> None:
    with pytest.raises(InputError, match=r"kvpref\.attach"):
        score(tiny_model("llama"))


def test_models_that_share_a_config_are_attached_one_by_one() -> None:
    """The attention's name is stored in the config, so that a reference model would be switched as well."""
    config = tiny_config("llama")
    policy, reference = build_model(config), build_model(config)
    assert policy.config is reference.config
    kvpref.attach(policy)
    assert reference.config._attn_implementation == "eager"
    assert config._attn_implementation == "eager"
    assert all(
        module.config._attn_implementation == "eager" for module in reference.modules() if hasattr(module, "config")
    )
    assert all(
        module.config._attn_implementation == "kvpref" for module in policy.modules() if hasattr(module, "config")
    )
    with pytest.raises(InputError, match=r"kvpref\.attach"):
        score(reference)
    kvpref.attach(reference)
    assert torch.equal(score(reference), score(policy))


def test_deepcopy_of_an_attached_model_is_attached_and_independent() -> None:
    model = kvpref.attach(tiny_model("llama"))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(2.0)
    score(copied).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in copied.parameters())
    assert not torch.equal(score(model), score(copied))


def test_a_pickled_model_asks_to_be_attached_again() -> None:
    """Pickling drops what was patched on the instance; half an attachment must not go unnoticed."""
    model = kvpref.attach(tiny_model("llama"))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with pytest.raises(InputError, match=r"kvpref\.attach"):
        score(loaded)
    assert torch.equal(score(kvpref.attach(loaded)), score(model))


@pytest.mark.parametrize("variant", ["llama", "granite", "gpt2"])
def test_a_saved_checkpoint_knows_nothing_of_kvpref(variant: str, tmp_path: Path) -> None:
    model = kvpref.attach(tiny_model(variant)).eval()
    score(model)
    model.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.json"):
        assert "kvpref" not in path.read_text(), path
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model.config.model_type
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    ids = torch.arange(6).unsqueeze(0) + 5
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_forward_that_was_already_patched_keeps_its_patch() -> None:
    model = tiny_model("llama").eval()
    calls = []
    original = model.forward

    def patched(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = patched
    kvpref.attach(model)
    num_calls = len(calls)
    model(input_ids=torch.tensor([[5, 6]]))
    assert len(calls) == num_calls + 1
    assert torch.equal(score(model), score(kvpref.attach(tiny_model("llama").eval())))


def test_attach_does_not_move_the_random_state() -> None:
    model = tiny_model("llama")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    score(kvpref.attach(model))
    assert torch.equal(torch.rand(2), expected)


def shared_config_references(policy: nn.Module) -> dict[str, nn.Module]:
    """The ways in which a reference model is made of a policy's config."""
    return {
        "deepcopy": copy.deepcopy(policy),
        "from_config": AutoModelForCausalLM.from_config(policy.config, dtype=torch.float32),
        "same class": type(policy)(policy.config),
    }


@pytest.mark.parametrize("how", ["deepcopy", "from_config", "same class"])
@pytest.mark.parametrize("wraps", [False, True], ids=["plain", "peft"])
def test_attaching_the_policy_leaves_a_reference_made_before_as_it_was(how: str, wraps: bool) -> None:
    policy = build_model(tiny_config("llama"))
    reference = shared_config_references(policy)[how].eval()
    attention = reference.config._attn_implementation
    inputs = padded_inputs()
    before = reference(**inputs).logits
    kvpref.attach(_wrapped(policy) if wraps else policy)
    assert policy.config._attn_implementation == "kvpref"
    assert reference.config._attn_implementation == attention != "kvpref"
    assert torch.equal(reference(**inputs).logits, before)
    with pytest.raises(InputError, match=r"kvpref\.attach"):
        score(reference)


@pytest.mark.parametrize("how", ["deepcopy", "from_config", "same class"])
@pytest.mark.parametrize("wraps", [False, True], ids=["plain", "peft"])
def test_a_reference_made_of_an_attached_policy(how: str, wraps: bool) -> None:
    """Its config names kvpref's attention from the start, so ordinary forwards must work and keep the padding."""
    policy = build_model(tiny_config("llama"))
    policy = kvpref.attach(_wrapped(policy) if wraps else policy)
    inner = policy.get_base_model() if wraps else policy
    reference = copy.deepcopy(policy) if how == "deepcopy" else shared_config_references(inner)[how]
    if how != "deepcopy":
        reference.load_state_dict(build_model(tiny_config("llama")).state_dict())
    # A new adapter does nothing, so every one of these is the same model.
    plain = build_model(tiny_config("llama")).eval()
    plain.set_attn_implementation("sdpa")
    inputs = padded_inputs()
    real = inputs["attention_mask"].bool()
    assert torch.equal(reference.eval()(**inputs).logits[real], plain(**inputs).logits[real])
    expected = score(kvpref.attach(plain))
    assert torch.equal(score(kvpref.attach(reference)), expected)
    with torch.no_grad():
        next(iter(policy.parameters())).mul_(2.0)
    assert torch.equal(score(reference), expected)


def _wrapped(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))

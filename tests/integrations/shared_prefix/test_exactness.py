"""Inside `shared_prefix` a model's own forward gives what it gives outside: outputs, losses and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from padded_batches import IGNORED, one_prompt, padded, sharing_rows, switch_on
from tiny_models import FAMILIES, VARIANTS, tiny_config, tiny_model, tiny_reward_model
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

import kvpref

# Only the order of additions differs; see test_exactness. Measured: 6e-15.
FP64_TOLERANCE = 1e-10
REWARD_FAMILIES = [name for name in FAMILIES if type(tiny_config(name)) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING]


def step(model: nn.Module, inputs: dict[str, Any], loss_of: Callable[[Any], torch.Tensor]) -> tuple[Any, dict]:
    """One forward and backward: the output, and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    with oracle.precision(model):
        output = model(**inputs)
        loss_of(output).backward()
    return output, oracle.grads_of(model)


def assert_served(
    model: nn.Module,
    inputs: dict[str, Any],
    loss_of: Callable[[Any], torch.Tensor] = lambda output: output.loss,
    real: torch.Tensor | None = None,
    tolerance: float = FP64_TOLERANCE,
) -> None:
    """The call is served, and its logits (where `real`), loss and gradients are those of the unchanged model."""
    before, grads_before = step(model, inputs, loss_of)
    with switch_on(model) as switch:
        after, grads = step(model, inputs, loss_of)
    assert switch.stats.num_served == 1, switch.stats
    assert switch.stats.num_unique_tokens < switch.stats.num_tokens == inputs["input_ids"].numel()
    logits, logits_before = after.logits, before.logits
    assert logits.shape == logits_before.shape
    if real is not None:
        logits, logits_before = logits[real], logits_before[real]
    assert oracle.relative_error(logits, logits_before) < tolerance
    assert oracle.relative_error(loss_of(after), loss_of(before)) < tolerance
    oracle.assert_same(oracle.Result(logits, grads), oracle.Result(logits_before, grads_before), tolerance)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_gradients_of_every_family(variant: str, side: str) -> None:
    # Learned positions are shared where columns agree, so rows of one length are what can share on the left.
    rows = [row[:20] + row[-1:] for row in one_prompt()] if variant.startswith("gpt2") else sharing_rows()
    inputs = padded(rows, side)
    assert_served(tiny_model(variant, torch.float64), inputs, real=inputs["attention_mask"].bool())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("window", [1, 8])
def test_windows_shorter_than_the_rows(window: int, side: str) -> None:
    inputs = padded(sharing_rows(), side)
    model = tiny_model("mistral", torch.float64, sliding_window=window)
    assert_served(model, inputs, real=inputs["attention_mask"].bool())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("variant", REWARD_FAMILIES)
def test_reward_models(variant: str, side: str) -> None:
    inputs = padded([row[:20] + row[-1:] for row in one_prompt()] + sharing_rows(), side)
    del inputs["labels"]
    assert_served(
        tiny_reward_model(variant, torch.float64), inputs, lambda output: (output.logits * output.logits).sum()
    )


def test_learned_positions_share_only_where_columns_agree() -> None:
    """The same prompt in other columns is another computation for GPT-2."""
    model = tiny_model("gpt2", torch.float64)
    inputs = padded([row[:30] for row in one_prompt(3)] + one_prompt(1), "left")
    tokens_run = {}
    for variant in ("gpt2", "llama"):
        with torch.no_grad(), switch_on(tiny_model(variant)) as switch:
            switch._model(**inputs)
        tokens_run[variant] = switch.stats.num_unique_tokens
    assert tokens_run["llama"] < tokens_run["gpt2"]
    assert_served(model, inputs, real=inputs["attention_mask"].bool())


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
@pytest.mark.parametrize("first", [0, 7])
def test_given_positions(variant: str, first: int) -> None:
    inputs = padded(one_prompt(), "left")
    mask = inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0) + first
    assert_served(tiny_model(variant, torch.float64), inputs, real=mask.bool())


def test_without_a_mask_all_tokens_are_real() -> None:
    inputs = padded([row[:42] for row in one_prompt()], extra=0)
    del inputs["attention_mask"]
    assert_served(tiny_model("llama", torch.float64), inputs)


@pytest.mark.parametrize("keep", [3, torch.tensor([0, 5, 41])], ids=["int", "tensor"])
def test_logits_to_keep(keep: int | torch.Tensor) -> None:
    inputs = padded([row[:42] for row in one_prompt()], extra=0)
    del inputs["labels"]
    inputs["logits_to_keep"] = keep
    assert_served(tiny_model("llama", torch.float64), inputs, lambda output: output.logits.square().sum())


def test_shift_labels() -> None:
    inputs = padded(sharing_rows())
    inputs["shift_labels"] = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
    inputs["num_items_in_batch"] = 7
    assert_served(tiny_model("llama", torch.float64), inputs, real=inputs["attention_mask"].bool())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_gradients_and_then_with(context: Callable[[], Any]) -> None:
    """The plan made in inference mode serves the training step on the same batch that follows."""
    model, inputs = tiny_model("llama", torch.float64), padded(sharing_rows())
    truth, grads = step(model, inputs, lambda output: output.loss)
    model.zero_grad()
    with switch_on(model) as switch, oracle.true_float64():
        with context():
            quiet = model(**inputs)
        output = model(**inputs)
        output.loss.backward()
    assert switch.stats.num_served == 2
    real = inputs["attention_mask"].bool()
    for found in (quiet, output):
        assert found.past_key_values is None
        assert oracle.relative_error(found.logits[real].clone(), truth.logits[real]) < FP64_TOLERANCE
    oracle.assert_same(
        oracle.Result(torch.zeros(0), oracle.grads_of(model)), oracle.Result(torch.zeros(0), grads), FP64_TOLERANCE
    )


def test_another_batch_of_the_same_shape_gets_its_own_plan() -> None:
    """Also when the tensor is the same and its content has changed."""
    model, inputs = tiny_model("llama", torch.float64).eval(), padded(one_prompt())
    with torch.no_grad(), oracle.true_float64(), switch_on(model) as switch:
        for _ in range(2):
            found = model(**inputs).logits
            truth = oracle.twin(model)(**inputs).logits
            real = inputs["attention_mask"].bool()
            assert oracle.relative_error(found[real], truth[real]) < FP64_TOLERANCE
            inputs["input_ids"].add_(1)
    assert switch.stats.num_served == 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["llama", "gpt2", "stablelm"])
def test_gradient_checkpointing(variant: str, attention: str) -> None:
    """Layers that are recomputed after the call find the attention of the call."""
    model, inputs = tiny_model(variant, torch.float64), padded(one_prompt())
    model.set_attn_implementation(attention)
    oracle.checkpoint_layers(model)
    assert_served(model, inputs, real=inputs["attention_mask"].bool())
    assert model.config._attn_implementation == attention


def test_an_attached_model() -> None:
    model, inputs = kvpref.attach(tiny_model("llama", torch.float64)), padded(one_prompt())
    assert_served(model, inputs, real=inputs["attention_mask"].bool())
    assert model.config._attn_implementation == "kvpref"


def test_backbone_called_directly() -> None:
    """As fused heads do; padding is zero."""
    model, inputs = tiny_model("llama", torch.float64).eval(), padded(one_prompt())
    del inputs["labels"]
    with torch.no_grad(), oracle.true_float64():
        truth = model.base_model(**inputs).last_hidden_state
        with switch_on(model) as switch:
            found = model.base_model(**inputs).last_hidden_state
    assert switch.stats.num_served == 1
    real = inputs["attention_mask"].bool()
    assert oracle.relative_error(found[real], truth[real]) < FP64_TOLERANCE
    assert not found[~real].any()


@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_bf16_is_no_worse_than_the_unchanged_model(kind: str) -> None:
    """Both round to bf16 (3e-3) in different places: fp64 judges both, with room for a factor of 2."""
    model = tiny_model("llama", torch.bfloat16 if kind == "weights" else torch.float32)
    inputs = padded(sharing_rows() + one_prompt(8))
    _, exact = step(oracle.twin(model, torch.float64), inputs, lambda output: output.loss)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        _, baseline = step(model, inputs, lambda output: output.loss)
        with switch_on(model) as switch:
            _, found = step(model, inputs, lambda output: output.loss)
    assert switch.stats.num_served == 1
    for name, grad in exact.items():
        if grad.ndim > 1:
            allowed = 2 * oracle.relative_error(baseline[name], grad)
            assert oracle.relative_error(found[name], grad) <= allowed, name


def test_lora_with_and_without_its_adapter() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=3, init_lora_weights=False
    )
    model, inputs = tiny_model("llama", torch.float64), padded(sharing_rows())
    base = oracle.twin(model)
    wrapped = peft.get_peft_model(model, config).to(torch.float64)
    real = inputs["attention_mask"].bool()
    assert_served(wrapped, inputs, real=real)
    with torch.no_grad(), oracle.true_float64(), switch_on(wrapped) as switch, wrapped.disable_adapter():
        reference = wrapped(**inputs).logits
    assert switch.stats.num_served == 1
    with oracle.true_float64():
        assert oracle.relative_error(reference[real], base(**inputs).logits[real]) < FP64_TOLERANCE


def test_lora_put_on_afterwards() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")
    model, inputs = tiny_model("llama"), padded(one_prompt())
    with switch_on(model) as switch:
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        wrapped(**inputs)
    assert switch.stats.num_served == 1


def test_inside_ddp() -> None:
    model, inputs = tiny_model("llama", torch.float64), padded(sharing_rows())
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert_served(wrapped, inputs, real=inputs["attention_mask"].bool())
    finally:
        torch.distributed.destroy_process_group()

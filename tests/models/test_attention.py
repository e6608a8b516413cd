"""How a pass reaches the layers, and what is refused there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from sample_groups import five_levels, pairs, tokens
from tiny_models import build_model, tiny_config, tiny_model
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, PreTrainedConfig

import kvpref
from kvpref import Group, Sequence, UnsupportedModelError
from kvpref.models.attention import attention_name, is_selected, register

# Only the order of additions differs; see test_exactness.
FP64_TOLERANCE = 1e-10

GPT_OSS = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "pad_token_id": 0,
}


def batch_of(groups: list[Group]) -> kvpref.Batch:
    return kvpref.collate(groups, min_shared_tokens=1)


def test_checkpointing_recomputes_layers_with_their_prefix() -> None:
    """transformers drops past_key_values under checkpointing; here the prompt must survive, also in recomputation."""
    model = oracle.checkpoint_layers(kvpref.attach(tiny_model("llama", torch.float64)), use_reentrant=False)
    calls = []
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda *args: calls.append(1))
    groups = pairs()
    with oracle.true_float64():
        logps = kvpref.response_logps(model, batch_of(groups)).token_logps
        num_forward = len(calls)
        (logps * oracle.loss_weights(groups)).sum().backward()
    assert num_forward == 2
    assert len(calls) == 2 * num_forward, "the layers were not recomputed, so this test proves nothing"
    truth = oracle.naive(tiny_model("llama", torch.float64), groups)
    oracle.assert_same(oracle.Result(logps.detach(), oracle.grads_of(model)), truth, FP64_TOLERANCE)


def test_checkpointing_every_other_layer() -> None:
    """Recomputed and kept layers in one model."""
    model = kvpref.attach(tiny_model("smollm3", torch.float64))
    if not hasattr(model, "activation_checkpointing_enable"):
        pytest.skip("this release of transformers checkpoints all layers or none")
    oracle.checkpoint_layers(model, every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False, True]
    found = oracle.shared(model, batch_of(five_levels()))
    oracle.assert_same(found, oracle.naive(tiny_model("smollm3", torch.float64), five_levels()), FP64_TOLERANCE)


def test_reentrant_checkpointing_is_refused_while_training() -> None:
    """It loses the gradient through keys and values without a word."""
    model = oracle.checkpoint_layers(kvpref.attach(tiny_model("llama")), use_reentrant=True)
    for mode in ("two_pass", "one_pass"):
        with pytest.raises(UnsupportedModelError, match="use_reentrant"):
            kvpref.response_logps(model, batch_of(pairs()), mode=mode)
    kvpref.response_logps(model.eval(), batch_of(pairs()))


def test_checkpointing_that_leaves_the_kind_open_is_refused() -> None:
    """The default has changed between releases of PyTorch, so the kind must be said."""
    model = kvpref.attach(tiny_model("llama"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"preserve_rng_state": False})
    with pytest.raises(UnsupportedModelError, match="use_reentrant"):
        kvpref.response_logps(model, batch_of(pairs()))


def test_copies_of_keyword_arguments_per_layer_do_no_harm() -> None:
    """FSDP2 maps over keyword arguments as pytrees, which copies every dict and list on the way to each layer."""

    def copy_arguments(module: nn.Module, args: Any, kwargs: Any) -> Any:
        def fresh(leaf: Any) -> Any:
            return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf

        return pytree.tree_map(fresh, args), pytree.tree_map(fresh, kwargs)

    model = kvpref.attach(tiny_model("llama", torch.float64))
    for module in [*model.model.layers, *(layer.self_attn for layer in model.model.layers)]:
        module.register_forward_pre_hook(copy_arguments, with_kwargs=True)
    found = oracle.shared(model, batch_of(five_levels()))
    oracle.assert_same(found, oracle.naive(tiny_model("llama", torch.float64), five_levels()), FP64_TOLERANCE)


def test_first_response_token_is_predicted_by_the_last_prompt_token() -> None:
    """Worked out by hand: a bigram model, whose logits depend on the current token only.

    With all layers' outputs zeroed, hidden = norm(embedding), so the log-prob of a token is a function of the token
    before it, and an off-by-one would show the prompt's first token or the response's own.
    """
    model = tiny_model("llama", torch.float64)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.zero_()
                projection.bias.zero_()
    prompt, response = [5, 9], [7, 11]
    with oracle.true_float64(), torch.no_grad():
        table = model.lm_head(model.model.norm(model.model.embed_tokens.weight)).log_softmax(-1)
        kvpref.attach(model)
        other = Sequence.from_prompt_and_response(prompt, [8])
        group = Group([Sequence.from_prompt_and_response(prompt, response), other])
        for mode in ("two_pass", "one_pass", "packed", "padded"):
            found = kvpref.response_logps(model, batch_of([group]), mode=mode).token_logps
            # One matrix product in two tilings: rounding of 1e-16 on numbers of order one.
            expected = torch.stack([table[9, 7], table[7, 11], table[9, 8]])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("window", [30, 17, 16, 4, 1])
@pytest.mark.parametrize("variant", ["mistral", "phi3"])
def test_sliding_window(variant: str, window: int) -> None:
    """Longer than the longest sequence, which has 17 tokens, as long, and shorter."""
    groups = pairs()
    assert max(len(sequence) for group in groups for sequence in group.sequences) == 17
    model = tiny_model(variant, torch.float64, sliding_window=window)
    truth = oracle.naive(oracle.twin(model), groups)
    kvpref.attach(model)
    for mode in ("two_pass", "one_pass", "packed", "padded"):
        oracle.assert_same(oracle.shared(model, batch_of(groups), mode=mode), truth, FP64_TOLERANCE)


@pytest.mark.parametrize("variant", ["qwen2", "qwen3"])
def test_sliding_window_in_some_layers_only(variant: str) -> None:
    layers = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}
    model = tiny_model(variant, torch.float64, **layers)
    truth = oracle.naive(oracle.twin(model), pairs())
    oracle.assert_same(oracle.shared(kvpref.attach(model), batch_of(pairs())), truth, FP64_TOLERANCE)
    assert oracle.worst_error(truth, oracle.naive(tiny_model(variant, torch.float64), pairs()))[0] > 1e-3


def test_bidirectional_attention_is_refused() -> None:
    model = kvpref.attach(tiny_model("llama"))
    model.config.is_causal = False
    for mode in ("two_pass", "one_pass", "packed"):
        with pytest.raises(UnsupportedModelError, match="later"):
            kvpref.response_logps(model, batch_of(pairs()), mode=mode)


def test_a_layer_that_bypasses_the_attention_interface_is_refused() -> None:
    model = kvpref.attach(tiny_model("llama"))
    model.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(UnsupportedModelError, match=r"model.layers.1 \(LlamaDecoderLayer\) mixes tokens"):
        kvpref.response_logps(model, batch_of(pairs()))


@pytest.mark.parametrize("layers", ["plain", "checkpointed", "checkpointed by us"])
def test_a_layer_that_runs_twice(layers: str) -> None:
    """Each call reads the keys of its own, also where a checkpoint recomputes the second one first."""
    model = tiny_model("llama", torch.float64)
    model.model.layers[1] = model.model.layers[0]
    truth = oracle.naive(oracle.twin(model), five_levels())
    kvpref.attach(model)
    if layers == "checkpointed":
        oracle.checkpoint_layers(model)
    choice = "all" if layers == "checkpointed by us" else "none"
    batch = batch_of(five_levels())
    for changes in ({"mode": "two_pass"}, {"mode": "one_pass"}, {"schedule": "bounded", "max_tokens_per_chunk": 5}):
        found = oracle.scheduled(model, batch, checkpoint=choice, **changes)
        oracle.assert_same(found, truth, FP64_TOLERANCE)


def test_a_layer_that_runs_twice_in_a_foreign_checkpoint_is_refused() -> None:
    """It does not say which of the calls it recomputes."""
    model = tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    kvpref.attach(model)
    layer = model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    logps = kvpref.response_logps(model, batch_of(pairs())).token_logps
    with pytest.raises(UnsupportedModelError, match="attends more than once"):
        logps.sum().backward()


def test_a_context_of_the_users_own_around_recomputation() -> None:
    """Both run: the user's, and the one that takes the pass back to the layer."""
    entered = []

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        entered.append(name)
        yield

    model = kvpref.attach(tiny_model("llama", torch.float64))
    context_fn = lambda: (noted("first"), noted("again"))  # noqa: E731
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context_fn})
    truth = oracle.naive(tiny_model("llama", torch.float64), pairs())
    oracle.assert_same(oracle.shared(model, batch_of(pairs())), truth, FP64_TOLERANCE)
    assert entered == ["first"] * 4 + ["again"] * 4


def test_unknown_attention_keywords_are_refused() -> None:
    model = kvpref.attach(tiny_model("llama"))
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "indices": torch.ones(4)}), with_kwargs=True
    )
    with pytest.raises(UnsupportedModelError, match="LlamaAttention passes indices"):
        kvpref.response_logps(model, batch_of(pairs()))


def test_models_that_compute_with_their_masks_are_refused() -> None:
    for use in (lambda mask: mask[:, :, :, :5], lambda mask: mask[:, 0], lambda mask: mask.to(torch.float32)):
        model = kvpref.attach(tiny_model("llama"))
        model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, use=use: (args, {**kwargs, "attention_mask": use(kwargs["attention_mask"])}),
            with_kwargs=True,
        )
        with pytest.raises(UnsupportedModelError, match="attention mask"):
            kvpref.response_logps(model, batch_of(pairs()))


def test_a_failed_pass_leaves_nothing_behind() -> None:
    """The pass is bound only while masks are built, so that an ordinary forward after an error is ordinary."""
    model = tiny_model("llama").eval()
    ids = torch.tensor([tokens(6, 1)])
    kvpref.attach(model)
    expected = model(ids).logits
    layer = model.model.layers[0]
    handle = layer.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(RuntimeError("boom")))
    with pytest.raises(RuntimeError, match="boom"):
        kvpref.response_logps(model, batch_of(pairs()))
    handle.remove()
    assert torch.equal(model(ids).logits, expected)


def test_unknown_modes_and_backends_are_refused_by_name() -> None:
    model = kvpref.attach(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"'three_pass'.*two_pass, one_pass, packed, padded"):
        kvpref.response_logps(model, batch_of(pairs()), mode="three_pass")
    with pytest.raises(ValueError, match=r"'fastest'.*cpu_flash, cuda_flash, efficient, tiled, reference"):
        kvpref.response_logps(model, batch_of(pairs()), backend="fastest")


@pytest.mark.parametrize("config", [tiny_config("gemma2"), GptOssConfig(**GPT_OSS)], ids=["gemma2", "gpt_oss"])
def test_ordinary_forwards_keep_what_sdpa_cannot_compute(config: PreTrainedConfig) -> None:
    """Softcapped scores and sinks: outside passes, and in mode `padded`, the family's own attention runs."""
    model = build_model(config).eval()
    ids = torch.tensor([tokens(9, 1), tokens(9, 2)])
    padding = torch.ones_like(ids)
    padding[1, :3] = 0
    expected = model(input_ids=ids, attention_mask=padding).logits
    register()
    model.set_attn_implementation(attention_name(model))
    assert is_selected(model.config)
    assert torch.equal(model(input_ids=ids, attention_mask=padding).logits[padding.bool()], expected[padding.bool()])

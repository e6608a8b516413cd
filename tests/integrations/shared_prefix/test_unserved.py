"""Calls that cannot be served run the unchanged model, bit for bit, and are counted by reason."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from padded_batches import one_prompt, padded, switch_on, unlike_rows
from tiny_models import tiny_model, tiny_reward_model
from torch import nn
from transformers import DynamicCache
from transformers.integrations.neftune import neftune_post_forward_hook

import kvpref


def served_inputs(**changes: Any) -> dict[str, Any]:
    """A call that is served, but for what is changed; None takes an argument away."""
    inputs = {**padded(one_prompt()), **changes}
    return {name: value for name, value in inputs.items() if value is not None}


def gaps() -> torch.Tensor:
    mask = padded(one_prompt())["attention_mask"]
    mask[:, 3] = 0
    return mask


def labels_at_padding() -> torch.Tensor:
    inputs = padded(one_prompt())
    return inputs["input_ids"].clone()


def restarting_positions() -> torch.Tensor:
    return torch.arange(padded(one_prompt())["input_ids"].shape[1]).remainder(20).unsqueeze(0)


def four_dimensional() -> torch.Tensor:
    width = padded(one_prompt())["input_ids"].shape[1]
    return torch.ones(4, 1, width, width).tril().log()


SHAPE = padded(one_prompt())["input_ids"].shape
CALLS: dict[str, dict[str, Any]] = {
    "use_cache": served_inputs(use_cache=True),
    "output_attentions": served_inputs(output_attentions=True),
    "output_hidden_states": served_inputs(output_hidden_states=True),
    "inputs_embeds": served_inputs(input_ids=None, inputs_embeds=torch.ones(*SHAPE, 32)),
    "one row": {name: value[:1] for name, value in served_inputs().items()},
    "nothing shared": padded(unlike_rows()),
    "attention_mask with gaps or empty rows": served_inputs(attention_mask=gaps()),
    "attention_mask with values other than 0 and 1": served_inputs(
        attention_mask=2 * served_inputs()["attention_mask"]
    ),
    "attention_mask that is not (rows, columns)": served_inputs(attention_mask=four_dimensional()),
    "attention_mask of floats": served_inputs(attention_mask=served_inputs()["attention_mask"].bfloat16()),
    "position_ids that are not (rows, columns)": served_inputs(position_ids=torch.zeros(1, 1, dtype=torch.int64)),
    "position_ids that do not count up by one": served_inputs(position_ids=restarting_positions()),
    "labels that padding predicts": served_inputs(labels=labels_at_padding()),
}


def bits(output: Any) -> list[torch.Tensor]:
    """Every tensor of an output, in order."""
    values = output.values() if hasattr(output, "values") else output
    flat = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
    return [item for item in flat if isinstance(item, torch.Tensor)]


def assert_unchanged(model: nn.Module, inputs: dict[str, Any], reason: str, **options: Any) -> None:
    """Inside the switch the call gives the same bits, gradients included, and is counted under `reason`."""

    def run() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        tensors = bits(model(**inputs))
        if tensors[0].requires_grad:
            tensors[0].square().sum().backward()
        return tensors, oracle.grads_of(model)

    before, grads_before = run()
    with switch_on(model, **options) as switch:
        after, grads = run()
    assert switch.stats.num_calls == 1
    assert switch.stats.num_served == 0
    assert dict(switch.stats.unserved) == {reason: 1}
    assert len(before) == len(after)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(torch.equal(grads_before[name], grads[name]) for name in grads)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("reason", CALLS)
def test_calls(reason: str, attention: str) -> None:
    if reason == "output_attentions" and attention == "sdpa":
        pytest.skip("transformers gives no attention weights with sdpa")
    model = tiny_model("llama")
    model.set_attn_implementation(attention)
    assert_unchanged(model, CALLS[reason], reason)


def test_past_key_values() -> None:
    model, inputs = tiny_model("llama").eval(), padded([row[:42] for row in one_prompt()], extra=0)
    with torch.no_grad(), switch_on(model) as switch:
        first = model(inputs["input_ids"], use_cache=True, past_key_values=DynamicCache(config=model.config))
        model(inputs["input_ids"][:, :5], past_key_values=first.past_key_values)
    assert dict(switch.stats.unserved) == {"past_key_values": 2}


def test_generate_is_unchanged() -> None:
    model, inputs = tiny_model("llama").eval(), padded(one_prompt(), "left")
    del inputs["labels"]
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = model.generate(**inputs, **arguments)
    with switch_on(model) as switch:
        assert torch.equal(model.generate(**inputs, **arguments), before)
    assert switch.stats.num_served == 0
    assert switch.stats.num_calls > 0


def test_token_type_ids() -> None:
    """GPT-2 adds an embedding for each."""
    inputs = served_inputs(token_type_ids=torch.ones(SHAPE, dtype=torch.int64))
    assert_unchanged(tiny_model("gpt2"), inputs, "token_type_ids")


def test_what_the_config_asks_for() -> None:
    model = tiny_model("llama")
    model.config.output_hidden_states = True
    assert_unchanged(model, served_inputs(), "output_hidden_states")


@pytest.mark.parametrize("in_config", [False, True])
def test_backbones_asked_for_a_tuple(in_config: bool) -> None:
    model, inputs = tiny_model("llama"), served_inputs(labels=None)
    if in_config:
        model.config.return_dict = False
    else:
        inputs["return_dict"] = False
    with torch.no_grad(), switch_on(model) as switch:
        assert isinstance(model.base_model(**inputs), tuple)
    assert dict(switch.stats.unserved) == {"return_dict": 1}


def test_less_than_asked_for_is_shared() -> None:
    assert_unchanged(tiny_model("llama"), served_inputs(), "little shared", min_saved=0.9)
    assert_unchanged(tiny_model("llama"), served_inputs(), "little shared", min_saved_tokens=1000)


def test_shared_prefixes_too_short_for_a_segment() -> None:
    """The rows share 40 tokens; the tree may not use them."""
    assert_unchanged(tiny_model("llama"), served_inputs(), "nothing shared", min_shared_tokens=41)


@pytest.mark.parametrize("setting", ["attention_dropout", "hidden_dropout"])
def test_dropout_is_served_in_eval_only(setting: str) -> None:
    model = tiny_model("gpt_neox", **{setting: 0.5})
    assert_unchanged(model, served_inputs(), "dropout")
    with switch_on(model.eval()) as switch:
        model(**served_inputs())
    assert switch.stats.num_served == 1


@pytest.mark.parametrize("options", [{"use_reentrant": True}], ids=["re-entrant"])
def test_re_entrant_checkpointing(options: dict[str, bool]) -> None:
    model = tiny_model("llama")
    oracle.checkpoint_layers(model, **options)
    assert_unchanged(model, served_inputs(), "gradient checkpointing")
    with switch_on(model.eval()) as switch:  # nothing is checkpointed here
        model(**served_inputs())
    assert switch.stats.num_served == 1


def test_checkpointing_with_contexts_of_its_own() -> None:
    model = tiny_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": torch.utils.checkpoint.noop_context_fn})
    assert_unchanged(model, served_inputs(), "gradient checkpointing")


def test_noise_on_embeddings() -> None:
    model = tiny_model("llama")
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    assert_unchanged(model, served_inputs(), "neftune_noise_alpha")


def test_weights_that_zero_3_cuts() -> None:
    model = tiny_model("llama")
    with switch_on(model) as switch:
        model.lm_head.weight.ds_id = 0  # its mark
        model(**served_inputs())
    assert switch.stats.unserved == {"weights cut by ZeRO-3": 1}
    with pytest.raises(kvpref.UnsupportedModelError, match="ZeRO-3"):
        switch_on(model)


def test_tokens_that_see_later_ones() -> None:
    model = tiny_model("llama")
    model.config.is_causal = False
    assert_unchanged(model, served_inputs(), "attention that kvpref does not follow in these rows")
    assert model.config._attn_implementation == "eager"


def test_adapters_by_row() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    inputs = served_inputs(adapter_names=["default", "__base__", "default", "__base__"])
    assert_unchanged(model, inputs, "adapters that differ by row")


def test_pooling_at_padding() -> None:
    """A padding token that the classifier does not know as such: it reads the last column."""
    inputs = padded(one_prompt())
    del inputs["labels"]
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 9)
    assert_unchanged(tiny_reward_model("llama"), inputs, "pooling at padding")


def test_arguments_that_do_not_exist_are_refused_by_the_model() -> None:
    model = tiny_model("llama")
    with switch_on(model) as switch, pytest.raises(TypeError):
        model.base_model(*range(30))
    assert switch.stats.num_calls == 1


def test_kvprefs_own_passes_are_not_counted() -> None:
    model = kvpref.attach(tiny_model("llama"))
    groups = [
        kvpref.Group([kvpref.Sequence.from_prompt_and_response(row[:40], row[40:]) for row in one_prompt()]),
    ]
    for mode in ("two_pass", "padded"):
        before = kvpref.response_logps(model, kvpref.collate(groups), mode=mode).token_logps
        with switch_on(model) as switch:
            assert torch.equal(kvpref.response_logps(model, kvpref.collate(groups), mode=mode).token_logps, before)
        assert switch.stats.num_calls == 0


def test_stats_in_one_line() -> None:
    model = tiny_model("llama").eval()
    with torch.no_grad(), switch_on(model) as switch:
        assert str(switch.stats) == "0 of 0 calls served: 0 tokens run in place of 0; unserved: none"
        model(**served_inputs())
        model(**padded(unlike_rows()))
        model(**padded(unlike_rows()))
    # 40 prompt tokens once, responses of 3, 4, 5 and 6; the padded batch is 4 x 47.
    expected = "1 of 3 calls served: 58 tokens run in place of 188; unserved: nothing shared (2)"
    assert str(switch.stats) == expected

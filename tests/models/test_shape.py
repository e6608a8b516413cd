"""The closed form of a model's FLOPs against PyTorch's own counter, over a whole forward and backward."""

from __future__ import annotations

import pytest
import torch
from sample_groups import five_levels, pairs
from tiny_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode

import kvpref
from kvpref.models.shape import model_shape
from kvpref.plan.flops import count_work


@pytest.mark.parametrize("mode", ["two_pass", "one_pass", "packed"])
@pytest.mark.parametrize("variant", ["llama", "qwen3", "gpt2", "gemma", "phi3", "gpt_neox"])
def test_closed_form_equals_the_counter(variant: str, mode: str) -> None:
    """Every product of the linear layers, of attention and of the LM head, forward and backward."""
    model = kvpref.attach(tiny_model(variant))
    batch = kvpref.collate(five_levels() + pairs(), min_shared_tokens=1)
    batch.plan(mode)
    with FlopCounterMode(display=False) as counter:
        kvpref.response_logps(model, batch, mode=mode).token_logps.sum().backward()
    expected = model_shape(model).flops(count_work(batch.plan(mode)))
    counts = counter.get_flop_counts()["Global"]
    attention = sum(flops for operator, flops in counts.items() if "cascade" in str(operator))
    assert attention == expected.attention
    # The rotary embedding multiplies positions by frequencies, (T, head_dim / 2), once per pass.
    rotary = sum(flops for operator, flops in counts.items() if operator is torch.ops.aten.bmm)
    assert sum(counts.values()) - attention - rotary == expected.linear + expected.head
    assert rotary < 0.01 * expected.total


def test_an_adapter_on_the_head_is_a_head() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")
    plain = model_shape(tiny_model("llama"))
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], r=2)
    shape = model_shape(peft.get_peft_model(tiny_model("llama"), config))
    assert (shape.vocab_size, shape.hidden_size) == (plain.vocab_size, plain.hidden_size)

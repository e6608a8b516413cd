"""PEFT on a model whose LM head is its embeddings: trained whole, tied or not, against each sequence alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from preference_runs import make_args, make_groups, make_model
from sample_groups import five_levels
from tiny_models import tiny_model
from torch import nn

import kvpref
from kvpref.models.shape import model_shape

peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")

# Only the order of additions differs; see test_exactness.
FP64_TOLERANCE = 1e-10
SHAPES: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["lm_head"]},
    "head, tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "embeddings, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "single tokens": {"trainable_token_indices": [1, 2]},
}


def wrap(model: nn.Module, **options: Any) -> Any:
    """LoRA with random adapters and changed copies, the same for every call."""
    config = {"target_modules": ["q_proj", "down_proj"], "r": 3, "init_lora_weights": False, **options}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config)).to(torch.float64)
    for name, item in wrapped.named_parameters():
        if "modules_to_save" in name:
            item.data.mul_(1.5)
    return wrapped


def naive(shape: str) -> oracle.Result:
    return oracle.naive(wrap(tiny_model("llama:tied", torch.float64), **SHAPES[shape]), five_levels())


@pytest.mark.thinned(5)
@pytest.mark.parametrize("order", ["attach first", "wrap first"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_what_peft_trains(shape: str, order: str) -> None:
    model = tiny_model("llama:tied", torch.float64)
    model = wrap(kvpref.attach(model), **SHAPES[shape]) if order == "attach first" else wrap(model, **SHAPES[shape])
    model = kvpref.attach(model)
    batch = kvpref.collate(five_levels(), min_shared_tokens=1)
    oracle.assert_same(oracle.shared(model, batch), naive(shape), FP64_TOLERANCE)
    bounded = oracle.scheduled(model, batch, schedule="bounded", max_tokens_per_chunk=4)
    oracle.assert_same(bounded, naive(shape), FP64_TOLERANCE)


def test_the_vocabulary_is_that_of_the_weights() -> None:
    """PEFT's tied copy of the head claims hidden_size outputs."""
    plain = model_shape(kvpref.attach(tiny_model("llama:tied")))
    tied = model_shape(kvpref.attach(wrap(tiny_model("llama:tied"), **SHAPES["head, tied"])))
    assert (tied.hidden_size, tied.vocab_size) == (plain.hidden_size, plain.vocab_size)


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_head_starts_at_the_base_model(tmp_path: Path, tied: bool) -> None:
    options = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["lm_head"]}
    config = peft.LoraConfig(task_type="CAUSAL_LM", ensure_weight_tying=tied, **options)
    model = peft.get_peft_model(make_model(), config).double()
    args = make_args(str(tmp_path), precompute_reference=False)
    trainer = kvpref.PreferenceTrainer(model, args, train_dataset=make_groups())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-7)  # policy = reference
    trainer.save_model(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(make_model(), str(tmp_path / "saved")).double().eval()
    tokens = torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)

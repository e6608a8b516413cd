"""The model's own forward on given hidden states: what it may read, and how many logits exist at once."""

from __future__ import annotations

import odd_heads
import pytest
import torch
from sample_groups import pairs
from tiny_models import VOCAB_SIZE, tiny_model, tiny_reward_model
from transformers import Llama4Config, Llama4ForConditionalGeneration

import kvpref
from kvpref.models import own_head
from kvpref.models.head_form import head_form, verify_head
from kvpref.models.own_head import GivenHidden, given_outputs, own_outputs, own_statistics
from kvpref.records.requests import HeadOptions

HIDDEN = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("change", [odd_heads.biased_by_token, odd_heads.mixed_rows])
def test_heads_that_read_more_than_hidden_states_are_refused(change: odd_heads.Change) -> None:
    with pytest.raises(kvpref.UnsupportedModelError, match="more than the hidden state of each token"):
        kvpref.attach(odd_heads.with_logits(change))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_layers_are_left_out_and_put_back(family: str) -> None:
    model = tiny_model(family)
    before = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    found = own_outputs(model, HIDDEN.unsqueeze(0))
    assert torch.equal(found[0], model.get_output_embeddings()(HIDDEN))
    assert torch.equal(model(input_ids=torch.tensor([[5, 6, 7]])).logits, before)
    with pytest.raises(RuntimeError), given_outputs(model, GivenHidden(last_hidden_state=HIDDEN)):
        raise RuntimeError
    assert "forward" not in model.base_model.__dict__


def test_logits_that_do_not_come_from_the_head_are_refused() -> None:
    """A forward that hands on what it is given looks like any function of each row."""
    model = odd_heads.with_logits(odd_heads.softcapped)
    plain = model.lm_head
    model.lm_head = torch.nn.Identity()
    model.get_output_embeddings = lambda: plain
    with pytest.raises(kvpref.UnsupportedModelError, match="does not make its logits with its output layer"):
        kvpref.attach(model)


def test_a_language_model_inside_a_model_of_images_keeps_its_head() -> None:
    """Llama 4 keeps its LM head inside the part that its forward calls."""
    text = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Llama4Config(text_config=text | {"num_local_experts": 2}, vision_config=vision)
    model = Llama4ForConditionalGeneration(config)
    found = own_outputs(model, HIDDEN.unsqueeze(0))
    torch.testing.assert_close(found[0], model.language_model.lm_head(HIDDEN))
    verify_head(model)
    assert head_form(model).fused


def test_logits_of_few_rows_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(own_head._PIECE_BYTES, "cpu", 2 * 4 * VOCAB_SIZE)
    sizes: list[int] = []

    def counting(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        sizes.append(logits.shape[1])
        return logits * 2

    model = odd_heads.with_logits(counting, torch.float32)
    found = own_statistics(model, HIDDEN, torch.arange(5), HeadOptions())["token_logps"]
    assert sizes == [2, 2, 1]
    found.sum().backward()
    assert sorted(sizes) == [1, 1, 2, 2, 2, 2]  # once more, and not kept in between


def test_tokens_that_cannot_come() -> None:
    model = odd_heads.with_logits(odd_heads.masked)
    hidden = HIDDEN.double().requires_grad_()
    options = HeadOptions(entropy=True, collision=True)
    found = own_statistics(model, hidden, torch.arange(5), options)
    probabilities = odd_heads.masked(model.lm_head(hidden), torch.empty(0)).softmax(-1).double()
    torch.testing.assert_close(found["entropy"], torch.special.entr(probabilities).sum(-1))
    torch.testing.assert_close(found["collision"], probabilities.square().sum(-1).log())
    (found["entropy"].sum() + found["token_logps"].sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    beyond = own_statistics(model, hidden, torch.tensor([VOCAB_SIZE, 0, 1, 2, 3]), options)["token_logps"]
    assert beyond.isnan().tolist() == [True, False, False, False, False]


def test_logit_ids_outside_the_vocabulary_are_refused() -> None:
    model = kvpref.attach(odd_heads.with_logits(odd_heads.padded_vocabulary))
    head = HeadOptions(logit_ids=(VOCAB_SIZE - 1,))
    with pytest.raises(kvpref.InputError, match=rf"\[0, {VOCAB_SIZE - 4}\)"):
        kvpref.response_logps(model, kvpref.collate(pairs()), head=head)


@pytest.mark.parametrize("pad_token_id", [0, None, 7])
def test_reward_heads_of_no_known_form(pad_token_id: int | None) -> None:
    plain = kvpref.attach(tiny_reward_model("llama", torch.float64))
    odd = odd_heads.with_logits(odd_heads.softcapped, rewards=True)
    odd.config.pad_token_id = plain.config.pad_token_id = pad_token_id
    batch = kvpref.collate(pairs())
    rewards = kvpref.response_rewards(kvpref.attach(odd), batch).rewards
    expected = odd_heads.softcapped(kvpref.response_rewards(plain, batch).rewards, torch.empty(0))
    torch.testing.assert_close(rewards, expected)
    rewards.sum().backward()
    assert odd.score.weight.grad is not None

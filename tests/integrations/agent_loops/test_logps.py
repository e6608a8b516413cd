"""`tree_logps` and `tree_forward_backward`, against transformers' forward of each row alone."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import agent_rows
import oracle
import pytest
import torch
from tiny_models import tiny_model
from torch import nn

import kvpref
from kvpref import TreeLogps

# float64: two orders of summation.
TOLERANCE = 1e-10
TEMPERATURE = 0.7


def alone(model: nn.Module, rows: dict[str, torch.Tensor]) -> TreeLogps:
    """Every response token by the unattached model, one row without padding at a time."""
    assert model.config._attn_implementation == "eager"
    found = [torch.zeros(rows["response_mask"].shape, dtype=torch.float64) for _ in range(2)]
    for index, (ids, mask, wanted) in enumerate(zip(*(rows[name] for name in NAMES), strict=True)):
        columns = mask.nonzero().squeeze(1)
        logits = model(input_ids=ids[columns][None], use_cache=False).logits[0, :-1] / TEMPERATURE
        logps = logits.log_softmax(-1)
        own = logps.gather(1, ids[columns[1:], None]).squeeze(1) * wanted[columns[1:]]
        entropy = -(logps.exp() * logps).sum(1) * wanted[columns[1:]]
        for values, share in zip(found, (own, entropy), strict=True):
            values[index, columns[1:]] = share
    return TreeLogps(*found)


NAMES = ("input_ids", "attention_mask", "response_mask")


def loss_of(found: TreeLogps) -> torch.Tensor:
    """Another weight at every place, so that no error can cancel."""
    assert found.entropy is not None
    weights = torch.randn(2, *found.logps.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (weights[0] * found.logps).sum() + (weights[1] * found.entropy).sum()


def grads_of(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    return oracle.grads_of(model)


def assert_same(
    found: tuple[TreeLogps, dict[str, torch.Tensor]], truth: tuple[TreeLogps, dict[str, torch.Tensor]]
) -> None:
    """Both shapes of numbers, zeros where nothing is wanted, and every parameter's gradient."""
    for ours, theirs in zip(found[0], truth[0], strict=True):
        assert not ours[theirs == 0].any()
        assert oracle.relative_error(ours.detach(), theirs.detach()) <= TOLERANCE
    for name, theirs in truth[1].items():
        assert oracle.relative_error(found[1][name], theirs) <= TOLERANCE, name


def windowed(variant: str) -> dict[str, Any]:
    return {"sliding_window": 7} if variant == "mistral" else {}


CASES = [
    ("llama", "calls_that_nest", "both", "two_pass"),
    ("llama", "calls_that_nest", "left", "one_pass"),
    ("llama", "attempts_that_branch", "right", "two_pass"),
    ("llama", "some_without_responses", "both", "two_pass"),
    ("llama", "alone", "both", "two_pass"),
    ("mistral", "calls_that_nest", "both", "two_pass"),
    ("mistral", "attempts_that_branch", "left", "one_pass"),
    ("gpt2", "attempts_that_branch", "left", "two_pass"),  # learned positions: padding counts nowhere
]


@pytest.mark.parametrize(("variant", "kind", "side", "mode"), CASES)
def test_numbers_and_gradients_are_those_of_each_row_alone(variant: str, kind: str, side: str, mode: str) -> None:
    rows = agent_rows.padded(agent_rows.KINDS[kind](), side)
    naive = tiny_model(variant, torch.float64, **windowed(variant))
    model = kvpref.attach(tiny_model(variant, torch.float64, **windowed(variant)))
    with oracle.true_float64():
        truth = alone(naive, rows)
        expected = truth, grads_of(naive, loss_of(truth))
        found = kvpref.tree_logps(model, rows, temperature=TEMPERATURE, mode=mode)
        assert found.logps.shape == rows["input_ids"].shape
        assert_same((found, grads_of(model, loss_of(found))), expected)


@pytest.mark.parametrize("changes", [{"schedule": "bounded", "max_tokens_per_chunk": 16}, {"mode": "one_pass"}, {}])
def test_forward_backward_in_any_schedule(changes: dict[str, Any]) -> None:
    rows = agent_rows.padded(agent_rows.attempts_that_branch(), "both")
    naive, model = tiny_model("llama", torch.float64), kvpref.attach(tiny_model("llama", torch.float64))
    seen: list[TreeLogps] = []

    def policy_loss(found: TreeLogps) -> kvpref.LossOutput:
        seen.append(TreeLogps(*(values.detach() for values in found)))
        return kvpref.LossOutput(loss_of(found), {"mean": found.logps.detach().mean()})

    with oracle.true_float64():
        truth = alone(naive, rows)
        expected = loss_of(truth)
        grads = grads_of(naive, expected)
        expected = expected.detach()
        output = kvpref.tree_forward_backward(model, rows, policy_loss, temperature=TEMPERATURE, **changes)
    (found,) = seen
    assert_same((found, oracle.grads_of(model)), (truth, grads))
    assert float(output.loss) == pytest.approx(float(expected), rel=TOLERANCE)
    assert not output.loss.requires_grad
    assert float(output.metrics["mean"]) == pytest.approx(float(truth.logps.detach().mean()), rel=TOLERANCE)


def test_a_loss_that_is_none_is_called_by_its_name() -> None:
    def my_loss(found: TreeLogps) -> Any:
        return found.logps

    model = kvpref.attach(tiny_model("llama"))
    with pytest.raises(kvpref.InputError, match="loss 'my_loss' must return a scalar"):
        kvpref.tree_forward_backward(model, agent_rows.padded(agent_rows.alone()), my_loss)


def test_what_rows_share_runs_once() -> None:
    rows = agent_rows.padded(agent_rows.calls_that_nest(), "both")
    model = kvpref.attach(tiny_model("llama"))
    seen: list[int] = []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    kvpref.tree_logps(model, rows)
    longest = int(rows["attention_mask"].sum(1).max())
    # What is below `min_shared_tokens` behind a branch may run again.
    assert longest <= sum(seen) < 1.2 * longest < 0.5 * int(rows["attention_mask"].sum())


def test_a_mask_of_the_last_columns_gives_their_shape() -> None:
    """As in verl: prompts padded left, responses right, and masks of the responses' columns alone."""
    rows = agent_rows.padded(agent_rows.attempts_that_branch(), "both")
    first = int(rows["response_mask"].any(0).nonzero()[0])
    model = kvpref.attach(tiny_model("llama"))
    with torch.no_grad():
        whole = kvpref.tree_logps(model, rows)
        part = kvpref.tree_logps(model, {**rows, "response_mask": rows["response_mask"][:, first:]})
    assert part.logps.shape == (5, rows["input_ids"].shape[1] - first)
    for ours, theirs in zip(part, whole, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs[:, first:])


def test_options_change_what_is_computed() -> None:
    rows = agent_rows.padded(agent_rows.alone())
    model = kvpref.attach(tiny_model("llama"))
    with torch.no_grad():
        assert kvpref.tree_logps(model, rows, entropy=False).entropy is None
        flat = kvpref.tree_logps(model, rows, temperature=50.0).entropy
    assert flat is not None
    uniform = torch.tensor(101.0).log()  # of the vocabulary, nearly reached at this temperature
    assert (flat[rows["response_mask"].bool()] > 0.99 * uniform).all()
    with pytest.raises(kvpref.InputError, match="unknown mode 'tree'; choose from: two_pass"):
        kvpref.tree_logps(model, rows, mode="tree")
    with pytest.raises(kvpref.InputError, match="temperature must be positive"):
        kvpref.tree_logps(model, rows, temperature=0.0)


def test_rows_without_any_response_have_a_gradient_of_zero() -> None:
    rows = agent_rows.padded(agent_rows.alone())
    rows["response_mask"].zero_()
    model = kvpref.attach(tiny_model("llama"))
    found = kvpref.tree_logps(model, rows)
    assert not found.logps.any()
    found.logps.sum().backward()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_any_mapping_of_tensors_will_do() -> None:
    class Keyed(UserDict[str, Any]):
        """Without `in` for its names, as tensordict's."""

        def __contains__(self, name: object) -> bool:
            raise NotImplementedError

    rows = agent_rows.padded(agent_rows.attempts_that_branch(), "both")
    model = kvpref.attach(tiny_model("llama"))
    masks = {"attention_mask": rows["attention_mask"].bool(), "response_mask": rows["response_mask"].float()}
    others = {"advantages": torch.ones(5), "uid": ["a"] * 5, "position_ids": rows["attention_mask"].cumsum(1) - 1}
    with torch.no_grad():
        truth = kvpref.tree_logps(model, rows)
        found = kvpref.tree_logps(model, Keyed({**rows, **masks, **others}))
    assert torch.equal(found.logps, truth.logps)

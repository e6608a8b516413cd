"""Every objective in every mode and both schedules, with and without PEFT, against each sequence run alone."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from oracle_outputs import naive_responses, naive_rewards
from pairwise import pairwise
from sample_groups import tokens
from tiny_models import tiny_model, tiny_reward_model
from torch import nn

import kvpref
from kvpref import Batch, Group, LossOutput, ResponseLogps, Sequence
from kvpref.engine.reads import reads_of
from kvpref.losses import LOSSES, PreferenceLoss, make_loss
from kvpref.plan.modes import MODES

TOLERANCE = 1e-10  # float64 sums in another order; 1e-14 measured

# Where the defaults leave a part of the objective out.
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"label_smoothing": 0.1, "weighting": True, "ld_alpha": 0.5},
    "robust": {"label_smoothing": 0.1},
    "ipo": {"divergence": "alpha"},
    "hinge": {"divergence": "js"},
    "mixture": {"weights": {"dpo": 0.5, "sft": 0.7, "nca": 0.2}},
    "grpo": {"beta": 0.05, "entropy_coef": 0.01, "temperature": 0.8, "old": "reference"},
    "dapo": {"old": "reference"},
    "gspo": {"old": "reference", "beta": 0.1, "kl_estimator": "k2"},
    "cispo": {"old": "reference"},
    "rloo": {"beta": 0.1},
    "bradley_terry": {"center_rewards_coefficient": 0.01},
}
RANKED = {
    *("plackett_luce", "lipo", "all_pairs", "best_vs_rest", "weighted_sft"),
    *("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo", "rloo"),
    *("bradley_terry", "plackett_luce_reward", "reward_regression"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    **{mode: {"mode": mode} for mode in MODES},
    "bounded": {"schedule": "bounded", "max_tokens_per_chunk": 5},
}


class Truth(NamedTuple):
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    grads: dict[str, torch.Tensor]


def make_groups(name: str) -> list[Group]:
    """Prompts of their own with shared beginnings; pairs, or two to four responses with scores."""
    system = tokens(4, 400)
    sizes = (4, 2, 3) if name in RANKED else (2, 2, 2)
    groups = []
    for index, size in enumerate(sizes):
        prompt = system + tokens(5 + index, 401 + index)
        opening = tokens(2, 410 + index)
        responses = [(opening if n else []) + tokens(2 + n, 420 + 10 * index + n) for n in range(size)]
        groups.append(
            Group(
                [Sequence.from_prompt_and_response(prompt, response) for response in responses],
                scores=[(0.3 * n * (index + 2)) % 1.0 for n in range(size)] if name in RANKED else None,
                labels=None if name in RANKED else [index != 1, index == 1],
                id=f"made:{index + 1}",
            )
        )
    return groups


@functools.cache
def loss_of(name: str) -> PreferenceLoss:
    return make_loss(name, **SETTINGS.get(name, {}))


@functools.cache
def batch_of(name: str) -> Batch:
    return kvpref.collate(list(loss_of(name).prepare(make_groups(name))), min_shared_tokens=1)


def reference_of(name: str) -> ResponseLogps | None:
    if not loss_of(name).needs_reference:
        return None
    batch = batch_of(name)
    generator = torch.Generator().manual_seed(11)
    logps = -4.6 + 0.3 * torch.randn(batch.num_scored_tokens, generator=generator, dtype=torch.float64)
    return ResponseLogps(logps, batch.cu_seqlens, batch.group_index)


def make_model(name: str, *, peft: bool) -> nn.Module:
    is_reward = loss_of(name).reads == "ends"
    model = (tiny_reward_model if is_reward else tiny_model)("llama", torch.float64)
    if not peft:
        return model
    library = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        task = "SEQ_CLS" if is_reward else "CAUSAL_LM"
        adapted: nn.Module = library.get_peft_model(model, library.LoraConfig(task_type=task, **settings))
    return adapted


@functools.cache
def truth_of(name: str, *, peft: bool) -> Truth:
    model, loss, batch = make_model(name, peft=peft), loss_of(name), batch_of(name)
    with oracle.precision(model):
        policy: Any = naive_rewards(model, batch) if loss.reads == "ends" else naive_responses(model, batch, loss.head)
        output = loss(policy, reference_of(name), batch)
        output.loss.backward()
    return Truth(output.loss.detach(), output.metrics, oracle.grads_of(model))


def assert_is_truth(output: LossOutput, model: nn.Module, truth: Truth) -> None:
    assert output.metrics.keys() == truth.metrics.keys()
    for name, value in {**truth.metrics, "loss": truth.loss}.items():
        found = output.loss if name == "loss" else output.metrics[name]
        # Some are zero but for rounding: the advantages of a group sum to it.
        assert (found - value).abs() <= TOLERANCE * max(1.0, float(value.abs())), name
    grads = oracle.grads_of(model)
    assert grads.keys() == truth.grads.keys()
    scale = max(float(grad.norm()) for grad in truth.grads.values())
    assert scale > 0, "an objective without gradient shows nothing"
    for parameter, grad in truth.grads.items():
        assert (grads[parameter] - grad).norm() <= TOLERANCE * max(float(grad.norm()), 1e-3 * scale), parameter


@pytest.mark.parametrize(("name", "way", "weights"), pairwise(LOSSES, OPTIONS, ("whole", "peft")))
def test_objective(name: str, way: str, weights: str) -> None:
    truth = truth_of(name, peft=weights == "peft")
    model = kvpref.attach(make_model(name, peft=weights == "peft"))
    with oracle.precision(model):
        output = kvpref.forward_backward(
            model, batch_of(name), loss_of(name), reference=reference_of(name), **OPTIONS[way]
        )
    assert_is_truth(output, model, truth)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_of_several_micro_batches_is_one(name: str) -> None:
    """Weighted by their units, the losses of micro-batches add up to that of the step; prompts are shared in it."""
    loss, whole = loss_of(name), batch_of(name)
    if any("couples" in (cls.__doc__ or "") for cls in type(loss).__mro__):
        pytest.skip("its docstring says that the cut into micro-batches changes it")
    truth = truth_of(name, peft=False)
    model = kvpref.attach(make_model(name, peft=False))
    reads = reads_of(model, loss.reads)
    batches = [kvpref.collate([group], min_shared_tokens=1, reads=reads) for group in whole.groups]
    units = [loss.num_units(batch) for batch in batches]
    assert sum(units) == loss.num_units(whole) > 0
    reference, references, start = reference_of(name), [], 0
    for batch in batches:
        part = None
        if reference is not None:
            values = reference.token_logps[start : start + batch.num_scored_tokens]
            part = ResponseLogps(values, batch.cu_seqlens, batch.group_index)
        references.append(part)
        start += batch.num_scored_tokens
    with oracle.precision(model):
        outputs = kvpref.forward_backward_step(
            model,
            kvpref.join_batches(batches, max_tokens_per_chunk=6),
            loss,
            kvpref.EngineOptions(schedule="bounded", max_tokens_per_chunk=6),
            references=references,
            backward=lambda total, index: (total * units[index] / sum(units)).backward(),
        )
    total = sum(output.loss * count / sum(units) for output, count in zip(outputs, units, strict=True))
    assert_is_truth(LossOutput(total, truth.metrics), model, truth)

"""Models of real width: every schedule, mode and head output against float64, judged by naive 16-bit runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import oracle
import torch
from options import SweepOptions
from oracle_outputs import naive_outputs, naive_rewards

import kvpref
from gpu_run.rows import Figure, Finding, Rows, judged
from gpu_run.wide_models import FAMILIES, make_groups, make_model
from kvpref import HeadOptions

CHUNK = {True: 16, False: 256}
"""Tokens per chunk, by whether the run is dry."""
HEAD = HeadOptions(temperature=0.7, entropy=True, values=True, hidden=True, logit_ids=(7, 3, 90))
BAR = "at most twice the error of a naive run"
Values = Mapping[str, torch.Tensor]


class Truth(NamedTuple):
    """Values by name: in float64, and from a naive run in the dtype under test."""

    exact: Values
    naive: Values


def rows(options: SweepOptions) -> Rows:
    """Llama in every way; the families with other projections in two; what heads return besides log-probs."""
    bounded = {"schedule": "bounded", "max_tokens_per_chunk": CHUNK[options.dry_run]}
    ways: dict[str, dict[str, Any]] = {
        "two_pass": {},
        "bounded": bounded,
        "one_pass": {"mode": "one_pass"},
        "packed": {"mode": "packed"},
        "bounded, prefixes in host memory": bounded | {"prefix_cache": "cpu"},
        "bounded, checkpointed": bounded | {"checkpoint": "all"},
    }
    found: Rows = {f"llama {name}": partial(_model_row, "llama", way, options) for name, way in ways.items()}
    for name in ("two_pass", "bounded"):
        found[f"head outputs {name}"] = partial(_head_row, ways[name], options)
        found[f"rewards {name}"] = partial(_reward_row, ways[name], options)
    for family in FAMILIES:
        if family != "llama":
            found |= {
                f"{family} {name}": partial(_model_row, family, ways[name], options) for name in ("two_pass", "bounded")
            }
    return found


def _model_row(family: str, way: dict[str, Any], options: SweepOptions) -> Finding:
    truth = _log_probs(family, options)
    model = kvpref.attach(make_model(family, options))
    return _judge(_flat(oracle.scheduled(model, _batch(options), **way)), truth)


def _head_row(way: dict[str, Any], options: SweepOptions) -> Finding:
    truth = _head_outputs(options)
    seen: dict[str, torch.Tensor] = {}

    def loss(policy: kvpref.ResponseLogps, reference: None, batch: kvpref.Batch) -> torch.Tensor:
        seen.update({name: getattr(policy, name).detach() for name in _HEAD_NAMES})
        return _head_loss({name: getattr(policy, name) for name in _HEAD_NAMES})

    loss.head = HEAD  # type: ignore[attr-defined]
    model = kvpref.attach(_with_value_head(options))
    kvpref.forward_backward(model, _batch(options), loss, **way)
    return _judge(seen | oracle.grads_of(model), truth)


def _reward_row(way: dict[str, Any], options: SweepOptions) -> Finding:
    truth = _rewards(options)
    seen: list[torch.Tensor] = []

    @kvpref.loss(reads="ends")
    def loss(policy: kvpref.ResponseRewards, reference: None, batch: kvpref.Batch) -> torch.Tensor:
        seen.append(policy.rewards.detach())
        return policy.rewards.float().square().mean()

    model = kvpref.attach(make_model("llama", options, rewards=True))
    kvpref.forward_backward(model, _batch(options), loss, **way)
    return _judge({"rewards": seen[0]} | oracle.grads_of(model), truth)


def _judge(found: Values, truth: Truth) -> Finding:
    """Every value that is not negligible in float64."""
    errors = {}
    for name, exact in truth.exact.items():
        # Gradients that vanish but for rounding, and vectors (norms, biases), say nothing: sums of few roundings.
        if exact.norm() > 1e-3 and (exact.ndim > 1 or name in _OUTPUTS):
            errors[name] = [
                oracle.relative_error(side[name].reshape(exact.shape), exact) for side in (found, truth.naive)
            ]
    # In fp32 both errors are a few roundings, whose order decides which is the larger.
    slack = 0.0 if _is_16_bit(truth) else 1e-5
    wrong = [name for name, (own, naive) in errors.items() if not own <= 2 * naive + slack]
    worst = max(wrong or errors, key=lambda name: errors[name][0] / max(errors[name][1], 1e-12))
    own, naive = errors[worst]
    return judged(
        met=not wrong,
        bar=BAR,
        figures={"largest error": Figure(own, ""), "of a naive run": Figure(naive, "")},
        reason=f"worst: {worst}" + (f"; wrong: {', '.join(wrong[:4])}" if wrong else ""),
    )


_HEAD_NAMES = ("token_logps", "entropy", "values", "hidden", "logits")
_OUTPUTS = {*_HEAD_NAMES, "rewards"}


def _is_16_bit(truth: Truth) -> bool:
    return any(value.dtype.itemsize == 2 for value in truth.naive.values())


def _batch(options: SweepOptions) -> kvpref.Batch:
    modes = ("two_pass", "one_pass", "packed")
    return kvpref.collate(make_groups(options), min_shared_tokens=1, modes=modes, device=options.device)


def _flat(result: oracle.Result) -> dict[str, torch.Tensor]:
    return {"token_logps": result.token_logps, **result.grads}


def _both(make: Callable[[], torch.nn.Module], run: Callable[[torch.nn.Module], Values]) -> Truth:
    """Results of a naive run in float64 and in the dtype under test."""
    model = make()
    exact = run(oracle.twin(model, torch.float64))
    return Truth(exact=exact, naive=run(model))


@cache
def _log_probs(family: str, options: SweepOptions) -> Truth:
    groups = make_groups(options)
    return _both(lambda: make_model(family, options), lambda model: _flat(oracle.naive(model, groups)))


@cache
def _head_outputs(options: SweepOptions) -> Truth:
    batch = _batch(options)

    def run(model: torch.nn.Module) -> Values:
        with oracle.precision(model), options.device:
            outputs = naive_outputs(model, batch, HEAD)
            _head_loss(outputs).backward()
        return {name: value.detach() for name, value in outputs.items()} | oracle.grads_of(model)

    return _both(lambda: _with_value_head(options), run)


@cache
def _rewards(options: SweepOptions) -> Truth:
    batch = _batch(options)

    def run(model: torch.nn.Module) -> Values:
        with oracle.precision(model), options.device:
            rewards = naive_rewards(model, batch).rewards
            rewards.square().mean().backward()
        return {"rewards": rewards.detach()} | oracle.grads_of(model)

    return _both(lambda: make_model("llama", options, rewards=True), run)


def _head_loss(outputs: Values) -> torch.Tensor:
    return outputs["token_logps"].mean() + outputs["entropy"].mean() + outputs["values"].square().mean()


def _with_value_head(options: SweepOptions) -> torch.nn.Module:
    model = make_model("llama", options)
    head = kvpref.add_value_head(model)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, head.in_features))
    return model

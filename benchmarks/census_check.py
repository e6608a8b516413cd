"""One model of the census: the engine in every mode against the model's own forward on each sequence alone."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from census_models import VOCAB_SIZE, build
from transformers import PreTrainedModel

import kvpref
from kvpref.models import families
from kvpref.models.support import is_padded_only
from kvpref.models.vision.families import WITHOUT_IMAGES

MODES = ("two_pass", "one_pass", "packed", "bounded", "padded")
CHECKPOINTS = ("none", "all")
PROMPTS = (13, 7, 3)
RESPONSES = ((11, 6), (1, 4, 9, 2), (5, 1, 8))

# (log-probs in nats, gradients relative). Model code rounds to fp32 in norms and softmax whatever its dtype.
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-5, 1e-4)}
# Gradients below this share of the largest hold rounding only, and are measured against it.
_FLOOR = 1e-3
# The least change in a response's log-probs, from its second token on, that another prompt must cause.
_LEAST_MOVE = 1e-3


class Subject(NamedTuple):
    """A model to check, and its own forward's results on some groups.

    Attributes:
        model: In evaluation mode.
        groups: The groups for the engine.
        logps: Gives log-probs of the groups' scored tokens from a model's own forward, in the graph.
        prompt_moves: How far another prompt moves the log-probs of a response.
    """

    model: PreTrainedModel
    groups: list[kvpref.Group]
    logps: Callable[[PreTrainedModel], torch.Tensor]
    prompt_moves: float


class Gradients(NamedTuple):
    """The results of one run; gradients by name, None if there is none."""

    logps: torch.Tensor
    grads: dict[str, torch.Tensor | None]


def check(
    name: str, modes: tuple[str, ...], *, unlisted: bool = False, subject: Callable[[str], Subject] | None = None
) -> dict[str, Any]:
    """One line of the census.

    Args:
        name: Registry entry, or variant of one.
        modes: Which of `MODES` to run.
        unlisted: Ignore the list of refused families.
        subject: Builds the model to check; one on text if None.
    """
    warnings.filterwarnings("ignore")
    row: dict[str, Any] = {"model": name}
    try:
        made = (subject or _subject)(name)
        row["class"] = type(made.model).__name__
        truth = _naive(made, made.model)
        row["prompt_moves"] = made.prompt_moves
    except Exception as error:
        return _not_built(row, _told(error))
    row["no_gradient"] = [name for name, grad in truth.grads.items() if grad is None or not grad.norm()]
    if not bool(torch.isfinite(truth.logps).all()) or row["prompt_moves"] < _LEAST_MOVE:
        return _not_built(row, "the prompt does not matter, or logits are not finite")
    if unlisted:
        _let_in(made.model)
    row["runs"] = _runs(made, truth, modes)
    return {**row, **verdict_of(without_padded(row["runs"]))}


def _trains(model: PreTrainedModel) -> bool:
    """Whether the model computes the same in training mode as in evaluation mode."""
    return model.config.model_type != "phimoe"


def _not_built(row: dict[str, Any], reason: str) -> dict[str, Any]:
    name = row["model"].partition(":")[0]
    refusal = families.REFUSED.get(name)
    why = WITHOUT_IMAGES.get(name) if refusal is None else refusal.reason
    if why is not None:
        return {**row, "verdict": "refused", "reason": why, "not_built": reason}
    return {**row, "verdict": "not built", "reason": reason}


def _let_in(model: PreTrainedModel) -> None:
    for config in (model.config, model.config.get_text_config()):
        families.REFUSED.pop(config.model_type, None)
        families.FAMILIES.setdefault(config.model_type, families.Family())


def _subject(name: str) -> Subject:
    """A model with text-only groups."""
    model, groups = build(name), _groups()

    def logps(model: PreTrainedModel) -> torch.Tensor:
        return torch.cat([_token_logps(model, sequence) for group in groups for sequence in group.sequences])

    return Subject(model, groups, logps, _prompt_moves(model, groups))


def _runs(made: Subject, truth: Gradients, modes: tuple[str, ...]) -> dict[str, Any]:
    """Results by ``mode/checkpoint/dtype``."""
    runs: dict[str, Any] = {}
    model, groups = made.model, made.groups
    try:
        attached = kvpref.attach(copy.deepcopy(model).train(_trains(model)))
    except Exception as error:
        return {"attach": _failed(error), **_padded_only(model, groups, truth)}
    for mode in modes:
        for checkpoint in CHECKPOINTS if mode != "padded" else ("none",):
            engine = partial(_engine, attached, groups, mode, checkpoint)
            runs[f"{mode}/{checkpoint}/fp32"] = _compared(engine, truth, torch.float32)
    double = copy.deepcopy(model).double()
    try:
        truth = _naive(made, double)
    except Exception as error:
        runs["fp64"] = {"is": "does not run", "reason": _told(error)}
        return runs
    attached = kvpref.attach(double.train(_trains(model)))
    for mode, checkpoint in (("two_pass", "none"), ("bounded", "all")):
        if mode in modes:
            engine = partial(_engine, attached, groups, mode, checkpoint)
            runs[f"{mode}/{checkpoint}/fp64"] = _compared(engine, truth, torch.float64)
    return runs


def _padded_only(model: PreTrainedModel, groups: list[kvpref.Group], truth: Gradients) -> dict[str, Any]:
    """Results of mode ``padded``, for families listed as exact only in it."""
    if not is_padded_only(model.config):
        return {}
    attached = kvpref.attach(copy.deepcopy(model), padded_only=True)
    engine = partial(_engine, attached, groups, "padded", "none")
    return {"padded/none/fp32": _compared(engine, truth, torch.float32)}


def _compared(engine: Callable[[], Gradients], truth: Gradients, dtype: torch.dtype) -> dict[str, Any]:
    try:
        found = engine()
    except Exception as error:
        return _failed(error)
    logp_error = (found.logps - truth.logps).abs().max().item()
    worst, gradient_error = _gradient_error(found.grads, truth.grads)
    logp_tolerance, gradient_tolerance = TOLERANCES[dtype]
    is_exact = logp_error <= logp_tolerance and gradient_error <= gradient_tolerance
    errors = {"logp_error": float(f"{logp_error:.1e}"), "gradient_error": float(f"{gradient_error:.1e}")}
    return {"is": "exact", **errors} if is_exact else {"is": "wrong", **errors, "worst": worst}


def _gradient_error(found: dict[str, torch.Tensor | None], truth: dict[str, torch.Tensor | None]) -> tuple[str, float]:
    floor = _FLOOR * torch.stack([grad.norm() for grad in truth.values() if grad is not None]).max()
    errors = {}
    for name, exact in truth.items():
        grad = found[name]
        known = torch.zeros(()) if exact is None else exact
        difference = known if grad is None else grad - known
        errors[name] = float(difference.norm() / known.norm().clamp(min=floor))
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return worst, errors[worst]


def _engine(model: PreTrainedModel, groups: list[kvpref.Group], mode: str, checkpoint: str) -> Gradients:
    batch = kvpref.collate(groups, min_shared_tokens=1)
    options: dict[str, Any] = {"mode": mode, "checkpoint": checkpoint}
    if mode == "bounded":
        options = {"schedule": "bounded", "max_tokens_per_chunk": 10, "checkpoint": checkpoint}
    seen: list[torch.Tensor] = []

    def loss(policy: Any, reference: Any, batch: Any) -> kvpref.LossOutput:
        seen.append(policy.token_logps.detach())
        return kvpref.LossOutput((policy.token_logps * _weights(policy.token_logps)).sum(), {})

    model.zero_grad(set_to_none=True)
    kvpref.forward_backward(model, batch, loss, **options)
    return Gradients(seen[0], _grads_of(model))


def _naive(made: Subject, model: PreTrainedModel) -> Gradients:
    model.zero_grad(set_to_none=True)
    logps = made.logps(model)
    (logps * _weights(logps)).sum().backward()
    found = Gradients(logps.detach(), _grads_of(model))
    model.zero_grad(set_to_none=True)
    return found


def _token_logps(model: PreTrainedModel, sequence: kvpref.Sequence) -> torch.Tensor:
    ids = torch.tensor([sequence.input_ids])
    # Without a mask, Moshi of transformers 5.17 attends to later tokens.
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logps = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return logps[torch.tensor(sequence.scored[1:])]


@torch.no_grad()
def _prompt_moves(model: PreTrainedModel, groups: list[kvpref.Group]) -> float:
    """How far another prompt moves the log-probs of a response, from its second token on."""
    prompt, sequence = PROMPTS[0], groups[0].sequences[0]
    other = [(token + 31) % (VOCAB_SIZE - 10) + 5 for token in sequence.input_ids[:prompt]]
    changed = kvpref.Sequence.from_prompt_and_response(other, sequence.input_ids[prompt:])
    moved = (_token_logps(model, changed) - _token_logps(model, sequence))[1:]
    return float(f"{moved.abs().max().item():.2e}")


def _grads_of(model: PreTrainedModel) -> dict[str, torch.Tensor | None]:
    return {
        name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in model.named_parameters()
    }


def _weights(logps: torch.Tensor) -> torch.Tensor:
    return torch.randn(len(logps), generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(logps)


def _groups() -> list[kvpref.Group]:
    """Prompts and responses of random tokens; two responses begin alike, so that the tree has three levels."""
    generator = torch.Generator().manual_seed(3)

    def draw(length: int) -> list[int]:
        return torch.randint(5, VOCAB_SIZE - 4, (length,), generator=generator).tolist()

    groups = []
    for prompt_tokens, lengths in zip(PROMPTS, RESPONSES, strict=True):
        prompt, responses = draw(prompt_tokens), [draw(length) for length in lengths]
        if len(responses) == 4:
            responses[2][:3] = responses[1][:3]
        groups.append(kvpref.Group([kvpref.Sequence.from_prompt_and_response(prompt, one) for one in responses]))
    return groups


def without_padded(runs: dict[str, Any]) -> dict[str, Any]:
    """The runs that decide for a model on text; the page lists mode ``padded`` separately."""
    return {name: run for name, run in runs.items() if not name.startswith("padded")}


def verdict_of(runs: dict[str, Any]) -> dict[str, Any]:
    """The overall verdict of the runs, and the first run that shows it."""
    for verdict in ("wrong", "error", "refused"):
        found = {name: run for name, run in runs.items() if run["is"] == verdict}
        if found:
            name, run = next(iter(found.items()))
            reason = run.get("reason") or (
                f"log-probs off by {run['logp_error']}, gradient of {run['worst']} by {run['gradient_error']}"
            )
            return {"verdict": verdict, "reason": f"{name}: {reason}", "where": sorted(found)}
    return {"verdict": "exact"}


def _failed(error: Exception) -> dict[str, Any]:
    refused = isinstance(error, kvpref.UnsupportedModelError)
    return {"is": "refused" if refused else "error", "reason": str(error) if refused else _told(error)}


def _told(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    file = "/".join(place.filename.split("/")[-2:])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({file}:{place.lineno})"

"""Compare the engine with the naive forward on a given model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kvpref.engine.passes import response_logps
from kvpref.errors import UnsupportedModelError
from kvpref.models.attach import attach, detach
from kvpref.models.support import SAFE_FALLBACK
from kvpref.models.vision.own_inputs import own_inputs
from kvpref.plan.batch import Batch, collate
from kvpref.records.groups import Group, Sequence


@dataclass(frozen=True, kw_only=True)
class NumericErrors:
    """How far the engine's results are from each sequence run alone.

    Attributes:
        max_logp_error: Largest absolute difference of a token's log-prob, in nats.
        max_gradient_error: Largest relative difference (Frobenius norm) of a parameter's gradient.
        worst_parameter: The name of that parameter.
        logp_tolerance: The largest error that rounding in the model's dtype explains.
        gradient_tolerance: The same for gradients.
    """

    max_logp_error: float
    max_gradient_error: float
    worst_parameter: str
    logp_tolerance: float
    gradient_tolerance: float

    @property
    def within_tolerance(self) -> bool:
        return self.max_logp_error <= self.logp_tolerance and self.max_gradient_error <= self.gradient_tolerance


# Sums of about ten thousand products, evaluated in two orders, in fp64, fp32 and 16 bits.
_TOLERANCES = {torch.float64: (1e-5, 1e-5), torch.float32: (1e-4, 1e-3)}
_TOLERANCES_16_BIT = (0.5, 0.2)


def compare_with_naive(
    model: PreTrainedModel,
    *,
    mode: str = "two_pass",
    prompt_tokens: int = 48,
    response_tokens: int = 16,
    groups: AbstractSequence[Group] = (),
) -> NumericErrors:
    """Run a small batch both ways and compare log-probs and every parameter's gradient.

    The naive way is the model's own forward on each sequence alone, full logits included. The model's existing
    gradients are left unchanged.

    Args:
        model: A model of a supported family; it is attached here.
        mode: The mode to compare.
        prompt_tokens: Length of the random prompts, in tokens.
        response_tokens: Length of the longest random response, in tokens.
        groups: The data to compare on, possibly with images from the model's own processor; random tokens if empty.
    """
    attach(model)
    model.eval()
    batch = collate(groups, device=model.device) if groups else _random_batch(model, prompt_tokens, response_tokens)
    return _errors(model, _naive(model, batch), _shared(model, batch, mode))


def compare_unattached(model: PreTrainedModel) -> NumericErrors:
    """Like `compare_with_naive`, against the forward that the model has before this attaches it.

    Its modules are left in training or evaluation mode as they were. Unless the errors are within tolerance, or if
    this raises, the caller must not use it attached.

    Raises:
        UnsupportedModelError: If kvpref cannot run the model, which is then unchanged.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        batch = _random_batch(model, 24, 10)
        naive = _naive(model, batch)
        attach(model, listed_only=False)
        try:
            return _errors(model, naive, *(_shared(model, batch, mode) for mode in ("two_pass", "packed")))
        except Exception as error:
            detach(model)
            if isinstance(error, UnsupportedModelError):
                raise
            raise UnsupportedModelError(
                f"{type(model).__name__} stops inside kvpref's passes: {type(error).__name__}: {error}. {SAFE_FALLBACK}"
            ) from error
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class _Run:
    logps: torch.Tensor
    grads: dict[str, torch.Tensor]


def _errors(model: PreTrainedModel, naive: _Run, *runs: _Run) -> NumericErrors:
    """The errors of the worst run."""
    # Some gradients vanish exactly, such as a key bias without RoPE, and hold only rounding; they are measured against
    # the whole gradient instead of themselves.
    floor = 1e-3 * torch.stack([grad.norm() for grad in naive.grads.values()]).norm()
    relative = {
        name: _largest(((_of(run, name, grad) - grad).norm() / grad.norm().clamp(min=floor)) for run in runs)
        for name, grad in naive.grads.items()
    }
    worst = max(relative, key=lambda name: math.inf if math.isnan(relative[name]) else relative[name])
    logp_tolerance, gradient_tolerance = _TOLERANCES.get(model.dtype, _TOLERANCES_16_BIT)
    return NumericErrors(
        max_logp_error=_largest((run.logps - naive.logps).abs().max() for run in runs),
        max_gradient_error=relative[worst],
        worst_parameter=worst,
        logp_tolerance=logp_tolerance,
        gradient_tolerance=gradient_tolerance,
    )


def _largest(values: Iterable[torch.Tensor]) -> float:
    """The largest value; NaN if any is."""
    return torch.stack(list(values)).max().item()


def _of(run: _Run, name: str, like: torch.Tensor) -> torch.Tensor:
    return run.grads[name] if name in run.grads else torch.zeros_like(like)


def _random_batch(model: PreTrainedModel, prompt_tokens: int, response_tokens: int) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(model.config.get_text_config().vocab_size, (length,), generator=generator).tolist()

    groups = []
    for num_responses in (2, 3):
        prompt = draw(prompt_tokens)
        groups.append(
            Group(
                [
                    Sequence.from_prompt_and_response(prompt, draw(response_tokens - 3 * index))
                    for index in range(num_responses)
                ]
            )
        )
    return collate(groups, device=model.device)


def _naive(model: PreTrainedModel, batch: Batch) -> _Run:
    logps = []
    for sequence in batch.parts:
        inputs = own_inputs(model, sequence)
        logits = model(**inputs, use_cache=False).logits[0, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        scored = torch.tensor(sequence.scored[1:], device=batch.device)
        logps.append(logits.log_softmax(-1).gather(1, inputs["input_ids"][0, 1:, None]).squeeze(1)[scored])
    return _differentiated(model, torch.cat(logps))


def _shared(model: PreTrainedModel, batch: Batch, mode: str) -> _Run:
    return _differentiated(model, response_logps(model, batch, mode=mode).token_logps)


def _differentiated(model: PreTrainedModel, logps: torch.Tensor) -> _Run:
    weights = torch.linspace(0.5, 1.5, len(logps), device=logps.device)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad((logps * weights).sum(), list(named.values()), allow_unused=True)
    found = {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}
    return _Run(logps.detach(), found)

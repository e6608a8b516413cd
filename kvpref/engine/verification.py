"""Compare the engine with the naive forward on a model at hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kvpref.engine.passes import response_logps
from kvpref.models.attach import attach
from kvpref.plan.batch import Batch, collate
from kvpref.records.groups import Group, Sequence


@dataclass(frozen=True, kw_only=True)
class NumericErrors:
    """How far the engine is from each sequence run alone.

    Attributes:
        max_logp_error: Largest absolute difference of a token's log-prob, in nats.
        max_gradient_error: Largest relative difference (Frobenius norm) of a parameter's gradient.
        worst_parameter: Its name.
        logp_tolerance: What rounding in the model's dtype explains.
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


# Sums of some ten thousand products, evaluated in two orders, in fp64, fp32 and 16 bits.
_TOLERANCES = {torch.float64: (1e-5, 1e-5), torch.float32: (1e-4, 1e-3)}
_TOLERANCES_16_BIT = (0.5, 0.2)


def compare_with_naive(
    model: PreTrainedModel, *, mode: str = "two_pass", prompt_tokens: int = 48, response_tokens: int = 16
) -> NumericErrors:
    """Run a small random batch both ways and compare log-probs and every parameter's gradient.

    The naive way is the model's own forward on each sequence alone, full logits included. Gradients that the model
    holds are left as they were found.

    Args:
        model: A model of a supported family; it is attached here.
        mode: The mode to compare.
        prompt_tokens: Length of the random prompts, in tokens.
        response_tokens: Length of the longest random response, in tokens.
    """
    attach(model)
    model.eval()
    batch = _random_batch(model, prompt_tokens, response_tokens)
    weights = torch.linspace(0.5, 1.5, batch.num_scored_tokens, device=batch.device)
    naive_logps, naive_grads = _gradients(model, _naive_logps(model, batch), weights)
    logps, grads = _gradients(model, response_logps(model, batch, mode=mode).token_logps, weights)
    # Some gradients vanish exactly (a key bias without RoPE, say) and hold rounding only; they are measured against
    # the whole gradient instead of themselves.
    floor = 1e-3 * torch.stack([grad.norm() for grad in naive_grads.values()]).norm()
    relative = {
        name: ((grads[name] - naive).norm() / naive.norm().clamp(min=floor)).item()
        for name, naive in naive_grads.items()
    }
    worst = max(relative, key=relative.__getitem__)
    logp_tolerance, gradient_tolerance = _TOLERANCES.get(model.dtype, _TOLERANCES_16_BIT)
    return NumericErrors(
        max_logp_error=(logps - naive_logps).abs().max().item(),
        max_gradient_error=relative[worst],
        worst_parameter=worst,
        logp_tolerance=logp_tolerance,
        gradient_tolerance=gradient_tolerance,
    )


def _random_batch(model: PreTrainedModel, prompt_tokens: int, response_tokens: int) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()

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


def _naive_logps(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    logps = []
    for sequence in batch.sequences:
        input_ids = torch.tensor([sequence.input_ids], device=batch.device)
        logits = model(input_ids=input_ids, use_cache=False).logits[0, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        scored = torch.tensor(sequence.scored[1:], device=batch.device)
        logps.append(logits.log_softmax(-1).gather(1, input_ids[0, 1:, None]).squeeze(1)[scored])
    return torch.cat(logps)


def _gradients(
    model: PreTrainedModel, logps: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad((logps * weights).sum(), list(named.values()), allow_unused=True)
    found = {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}
    return logps.detach(), found

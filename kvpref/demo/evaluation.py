"""How good the model is on held-out questions: the share of right answers and of right preferences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvpref.data import PreferenceDataset
from kvpref.demo.task import Pair, check
from kvpref.engine.passes import response_logps
from kvpref.plan.batch import collate

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

QUESTIONS_PER_BATCH = 64
MAX_NEW_TOKENS = 6


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over the held-out pairs."""

    accuracy: float
    """Share of questions whose greedy answer is right, in [0, 1]."""

    preference_accuracy: float
    """Share of pairs whose chosen response is more probable than the rejected one, in [0, 1]."""

    logp_margin: float
    """Log-prob of the chosen minus that of the rejected response, in nats."""


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair], groups: PreferenceDataset
) -> Evaluation:
    """Evaluate an attached model.

    Args:
        model: The model; it is left in evaluation mode.
        tokenizer: A tokenizer that pads on the left.
        pairs: The held-out rows.
        groups: The same rows, tokenized; the chosen response comes first.
    """
    model.eval()
    num_right = sum(
        check(pair.prompt, answer) for pair, answer in zip(pairs, answer_greedily(model, tokenizer, pairs), strict=True)
    )
    margins = _logp_margins(model, groups)
    return Evaluation(
        accuracy=num_right / len(pairs),
        preference_accuracy=(margins > 0).double().mean().item(),
        logp_margin=margins.double().mean().item(),
    )


@torch.no_grad()
def answer_greedily(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> list[str]:
    """The most probable answers, token by token, as text; special tokens other than the end stay visible."""
    answers: list[str] = []
    untyped: Any = model  # transformers' annotation of `generate` does not accept its own classes
    for start in range(0, len(pairs), QUESTIONS_PER_BATCH):
        prompts = [pair.prompt for pair in pairs[start : start + QUESTIONS_PER_BATCH]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        output = untyped.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
            end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
            answers.append(" ".join(tokenizer.convert_ids_to_tokens(ids[:end])))
    return answers


@torch.no_grad()
def _logp_margins(model: LlamaForCausalLM, groups: PreferenceDataset) -> torch.Tensor:
    """Log-prob of the chosen minus that of the rejected response, (num_groups,), in nats."""
    margins = []
    for start in range(0, len(groups), QUESTIONS_PER_BATCH):
        batch = collate([groups[index] for index in range(start, min(start + QUESTIONS_PER_BATCH, len(groups)))])
        chosen, rejected = response_logps(model, batch).sum().view(-1, 2).unbind(1)
        margins.append(chosen - rejected)
    return torch.cat(margins)

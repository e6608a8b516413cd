"""A first training on whole texts, so that preferences have a model to improve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvpref.demo.task import ANSWER_WORD, Pair

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NUM_STEPS, ROWS_PER_STEP = 45, 16
LEARNING_RATE = 3e-3
IGNORED = -100


def warm_up(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> None:
    """Train on every answer of the first prompts, those of their examples too, until most questions are answered right.

    Args:
        model: Trained in place, on the CPU.
        tokenizer: The model's.
        pairs: At least `NUM_STEPS * ROWS_PER_STEP` rows.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=NUM_STEPS, pct_start=0.15)
    for step in range(NUM_STEPS):
        rows = pairs[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP]
        texts = [row.prompt + row.chosen + str(tokenizer.eos_token) for row in rows]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        loss = model(**inputs, labels=_answers(inputs["input_ids"], tokenizer)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _answers(input_ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """(num_rows, num_tokens) labels: answers and ends count, questions do not."""
    vocabulary = tokenizer.get_vocab()
    answers = input_ids.eq(vocabulary[ANSWER_WORD])
    counted = answers | input_ids.eq(vocabulary[str(tokenizer.eos_token)])
    counted[:, 1:] |= answers[:, :-1]
    return input_ids.masked_fill(~counted, IGNORED)

"""What the examples share: a tiny random model, made-up preferences, and a short training run on the CPU."""

from __future__ import annotations

import random
import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvpref

VOCAB_SIZE = 64


def make_model() -> LlamaForCausalLM:
    """A Llama of two layers with random weights, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def make_pairs(num_groups: int = 48, **columns: list[Any]) -> list[kvpref.Group]:
    """Pairs whose chosen response is made of even tokens and whose rejected one of odd ones, of different lengths.

    Args:
        num_groups: How many.
        **columns: Extra columns, one value per group.
    """
    groups = []
    for index, (prompt, draw) in enumerate(_prompts(num_groups)):
        sequences = [kvpref.Sequence.from_prompt_and_response(prompt, draw(odd)) for odd in (0, 1)]
        own = {name: values[index] for name, values in columns.items()}
        groups.append(kvpref.Group(sequences, labels=[True, False], id=f"toy:{index + 1}", columns=own))
    return groups


def make_scored_groups(num_groups: int = 48, num_responses: int = 4) -> list[kvpref.Group]:
    """Groups of responses, every other one of even tokens, with score 1, and the rest of odd tokens, with score 0."""
    groups = []
    for index, (prompt, draw) in enumerate(_prompts(num_groups)):
        odd = [response % 2 for response in range(num_responses)]
        sequences = [kvpref.Sequence.from_prompt_and_response(prompt, draw(flag)) for flag in odd]
        groups.append(kvpref.Group(sequences, scores=[1.0 - flag for flag in odd], id=f"toy:{index + 1}"))
    return groups


def train(
    loss: Any, groups: list[kvpref.Group], model: LlamaForCausalLM | None = None, num_steps: int = 30
) -> list[dict[str, float]]:
    """Train on the groups, 16 prompts per step; what the trainer logged, step by step."""
    with tempfile.TemporaryDirectory() as folder:
        args = kvpref.PreferenceTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=16,
            max_steps=num_steps,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = kvpref.PreferenceTrainer(model or make_model(), args, train_dataset=groups, loss=loss)
        trainer.train()
        return [line for line in trainer.state.log_history if "loss" in line]


def _prompts(num_groups: int) -> Any:
    """Per group a prompt, and a function that draws a response of even or odd tokens."""
    generator = random.Random(0)

    def draw(odd: int) -> list[int]:
        return [2 * generator.randrange(VOCAB_SIZE // 2) + odd for _ in range(generator.randint(2, 8))]

    for _ in range(num_groups):
        yield [generator.randrange(VOCAB_SIZE) for _ in range(20)], draw

"""Tiny models, data and arguments for trainer tests."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import kvpref

VOCAB_SIZE = 61


def make_model(seed: int = 0) -> GPT2LMHeadModel:
    """A float64 GPT-2: its layer norms stay in float64, so two ways to one gradient agree to 1e-10."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).double()


def make_groups(num_groups: int = 11, seed: int = 0) -> list[kvpref.Group]:
    """Pairs of varied lengths with shared prompts."""
    generator = random.Random(seed)

    def draw(low: int, high: int) -> list[int]:
        return [generator.randrange(VOCAB_SIZE) for _ in range(generator.randint(low, high))]

    groups = []
    for index in range(num_groups):
        prompt = draw(16, 30)
        responses = [kvpref.Sequence.from_prompt_and_response(prompt, draw(1, 12)) for _ in range(2)]
        groups.append(kvpref.Group(responses, labels=[True, False], id=f"made:{index + 1}"))
    return groups


def make_args(output: str, **overrides: Any) -> kvpref.PreferenceTrainingArguments:
    """Plain SGD without clipping or decay, so that weights show the gradients."""
    settings: dict[str, Any] = {
        "output_dir": output,
        "loss": "dpo",
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 6,
        "max_tokens_per_micro_batch": 120,
        "max_steps": 2,
        "sort_window_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **overrides,
    }
    return kvpref.PreferenceTrainingArguments(**settings)


def reference_free_loss(
    policy: kvpref.ResponseLogps, reference: kvpref.ResponseLogps | None, batch: kvpref.Batch
) -> kvpref.LossOutput:
    """Mean over groups of a nonlinear function of both responses, so that scaling errors show."""
    sums = policy.sum()
    margins = sums[0::2] - sums[1::2]
    return kvpref.LossOutput(loss=-torch.nn.functional.logsigmoid(0.1 * margins).mean(), metrics={})


def split_unevenly(groups: list[kvpref.Group]) -> list[list[kvpref.Group]]:
    """Two ranks' shares: the first three groups and all others."""
    return [groups[:3], groups[3:]]

"""Runs of the trainer that one process makes whole, and several ranks with a sharded model."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from preference_runs import VOCAB_SIZE, make_args, make_model
from torch import nn
from transformers import GPT2ForSequenceClassification

import kvpref
from kvpref.parallel.accelerate_fsdp2 import is_fsdp2

GROUPS_PER_STEP = 4
NUM_GROUPS = 7
"""Not two steps, so that ranks hold different numbers of groups."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, how, and against which reference."""

    loss: str = "dpo"
    adapter: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    """Training arguments besides."""

    second: str = ""
    """``other``: a reference model of another architecture is handed over."""

    def make_model(self) -> nn.Module:
        """A float64 GPT-2, with a scalar head or an adapter where the case asks for it."""
        model: Any = make_model()
        if self.loss == "bradley_terry":
            torch.manual_seed(3)
            model.config.num_labels, model.config.pad_token_id = 1, VOCAB_SIZE - 1
            model = GPT2ForSequenceClassification(model.config).double()
        if not self.adapter:
            return model
        import peft

        kind = "SEQ_CLS" if self.loss == "bradley_terry" else "CAUSAL_LM"
        config = peft.LoraConfig(task_type=kind, r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            adapted: nn.Module = peft.get_peft_model(model, config).double()
        return adapted

    def reference_model(self) -> nn.Module | None:
        """Another model, or None."""
        if self.second != "other":
            return None
        from tiny_models import tiny_model

        return tiny_model("llama", torch.float64)


def varied_groups(num_groups: int = NUM_GROUPS, seed: int = 0) -> list[kvpref.Group]:
    """Pairs that take one pass, two, or three beside another of their kind (prompts begin alike), in turns."""
    generator = random.Random(seed)

    def draw(low: int, high: int) -> list[int]:
        return [generator.randrange(VOCAB_SIZE - 1) for _ in range(generator.randint(low, high))]

    story, groups = draw(20, 20), []
    for index in range(num_groups):
        prompt = draw(4, 6) if index % 3 == 0 else draw(18, 28)
        prompt = [*story, *prompt] if index % 3 == 2 else prompt
        responses = [kvpref.Sequence.from_prompt_and_response(prompt, draw(1, 9)) for _ in range(2)]
        scores = [1.0, 0.25]
        groups.append(kvpref.Group(responses, labels=[True, False], scores=scores, id=f"made:{index + 1}"))
    return groups


def make_trainer(
    output: Path,
    case: Case,
    *,
    num_steps: int = 20,
    given_loss: Any = None,
    dtype: torch.dtype = torch.float64,
    **overrides: Any,
) -> kvpref.PreferenceTrainer:
    """A trainer of this process; sharded where there are several."""
    world_size = forget_process_state()
    settings: dict[str, Any] = {
        "loss": case.loss,
        "max_steps": num_steps,
        "learning_rate": 0.2,
        "max_grad_norm": 0.5,
        "per_device_train_batch_size": GROUPS_PER_STEP // world_size,
        "max_tokens_per_micro_batch": 90,
        **({"fsdp": "full_shard"} if world_size > 1 else {}),
        **case.settings,
        **overrides,
    }
    args = make_args(str(output), **settings)
    model = case.make_model().to(dtype)
    return kvpref.PreferenceTrainer(
        model, args, varied_groups(), loss=given_loss, reference_model=case.reference_model()
    )


def forget_process_state() -> int:
    """Let the next trainer make its own process state, for runs that follow one another; the number of processes."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    AcceleratorState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if world_size > 1:
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_CPU
    return world_size


def train_case(output: Path, case: Case) -> None:
    """Train, and leave the saved model and the losses in a folder."""
    trainer = make_trainer(output, case)
    trainer.train()
    assert is_fsdp2(trainer.model) == (trainer.args.world_size > 1)
    trainer.save_model(str(output))
    if trainer.args.process_index == 0:
        lines = [line for line in trainer.state.log_history if "loss" in line]
        (output / "losses.json").write_text(json.dumps([[line["loss"], line["grad_norm"]] for line in lines]))

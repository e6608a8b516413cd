"""Training runs through DeepSpeed, in float64, and the same runs without it."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from preference_runs import VOCAB_SIZE, make_args, make_groups, make_model
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedModel

import kvpref
from kvpref.models.partitioned import gathered

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None or not (shutil.which("g++") and shutil.which("ninja")),
    reason="needs deepspeed, and g++ and ninja, with which it builds its communication at first use",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    stage: int
    schedule: str
    loss: str
    lora: bool = False
    accumulation: int = 1
    sequence_parallel: int = 1

    @property
    def name(self) -> str:
        what = "lora" if self.lora else "all"
        return f"zero{self.stage}-{self.schedule}-{self.loss}-{what}-{self.accumulation}-{self.sequence_parallel}"


LOSSES = ("dpo", "bradley_terry", "grpo")
CASES = (
    Case(stage=1, schedule="full", loss="grpo", lora=True),
    Case(stage=2, schedule="bounded", loss="bradley_terry"),
    Case(stage=2, schedule="full", loss="dpo", accumulation=2),
    Case(stage=3, schedule="full", loss="bradley_terry", lora=True),
    Case(stage=3, schedule="bounded", loss="dpo", lora=True, accumulation=2),
    Case(stage=3, schedule="bounded", loss="grpo"),
    Case(stage=3, schedule="bounded", loss="bradley_terry", sequence_parallel=2),
)
"""Every stage, schedule, loss, way to train and way to accumulate, and most pairs of them."""

ALL_CASES = tuple(
    Case(stage=stage, schedule=schedule, loss=loss, lora=lora)
    for stage in (1, 2, 3)
    for schedule in ("full", "bounded")
    for loss in LOSSES
    for lora in (False, True)
)

ADAPTER_OFF = Case(stage=3, schedule="full", loss="dpo", lora=True, accumulation=2)
"""With evaluations, and references that are computed as they are needed: model and adapter in pieces in all of it."""

ADAPTER_OFF_SETTINGS: dict[str, Any] = {
    "reference": "base",
    "precompute_reference": False,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_eval_batch_size": 3,
}

RESUMED = Case(stage=3, schedule="bounded", loss="dpo")


def deepspeed_config(stage: int, **settings: Any) -> dict[str, Any]:
    """As small as it can be; some weights of ZeRO-3 stay whole, others do not."""
    # DeepSpeed's own buckets take gigabytes; here gradients fill several.
    zero = {"stage": stage, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 100
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": zero, **dict.fromkeys(auto, "auto"), **settings}


def make_trainer(
    case: Case, output: Path, num_ranks: int, *, deepspeed: bool, num_steps: int, **settings: Any
) -> kvpref.PreferenceTrainer:
    """On this rank of `num_ranks`, or on one that does the work of all."""
    num_groups_per_step = 8
    args = make_args(
        str(output),
        loss=case.loss,
        learning_rate=0.1,
        max_steps=num_steps,
        schedule=case.schedule,
        gradient_accumulation_steps=case.accumulation,
        per_device_train_batch_size=num_groups_per_step // (num_ranks // case.sequence_parallel if deepspeed else 1),
        sequence_parallel=case.sequence_parallel if deepspeed else 1,
        **({"max_tokens_per_chunk": 20} if case.schedule == "bounded" else {}),
        **({"deepspeed": deepspeed_config(case.stage)} if deepspeed else {}),
        **settings,
    )
    model: Any = make_reward_model() if case.loss == "bradley_terry" else make_model()
    if case.lora:
        torch.manual_seed(1)
        kind = "SEQ_CLS" if case.loss == "bradley_terry" else "CAUSAL_LM"
        # Random B as well: a fresh adapter has a gradient of zero in A.
        config = peft.LoraConfig(
            task_type=kind, r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
        )
        model = peft.get_peft_model(model, config).double()
    # The last step of an epoch has 3 of 8 groups: some ranks have less to do, and of four one has nothing.
    groups = make_scored_groups(11) if case.loss == "grpo" else make_groups(11)
    eval_groups = make_groups(5, seed=3) if "eval_strategy" in settings else None
    return kvpref.PreferenceTrainer(model, args, train_dataset=groups, eval_dataset=eval_groups)


def moved_trainer(
    output: Path, num_ranks: int, num_steps: int, stage: int | None = None, **settings: Any
) -> kvpref.PreferenceTrainer:
    """A run with Adam in float32; without a stage, without DeepSpeed."""
    args = make_args(
        str(output),
        optim="adamw_torch",
        learning_rate=1e-2,
        max_steps=num_steps,
        per_device_train_batch_size=8 // num_ranks,
        **({} if stage is None else {"deepspeed": deepspeed_config(stage)}),
        **settings,
    )
    return kvpref.PreferenceTrainer(make_model().float(), args, train_dataset=make_groups(11))


def second_model_trainer(output: Path, num_ranks: int, stage: int | None = None) -> kvpref.PreferenceTrainer:
    """A run whose reference is the model in the folder ``second``, which ZeRO-3 loads in pieces."""
    settings = {"reference_model": str(output / "second"), "precompute_reference": False}
    return moved_trainer(output / f"with-second-{stage}", num_ranks, 2, stage, **settings)


def make_reward_model() -> PreTrainedModel:
    """A float64 GPT-2 with a scalar head."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE + 1,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        num_labels=1,
        pad_token_id=VOCAB_SIZE,
    )
    return GPT2ForSequenceClassification(config).double()


def make_scored_groups(num_groups: int) -> list[kvpref.Group]:
    """2 to 5 scored responses per prompt."""
    generator = random.Random(0)

    def draw(low: int, high: int) -> list[int]:
        return [generator.randrange(VOCAB_SIZE) for _ in range(generator.randint(low, high))]

    groups = []
    for index in range(num_groups):
        prompt = draw(4, 20)
        responses = [
            kvpref.Sequence.from_prompt_and_response(prompt, draw(1, 9)) for _ in range(generator.randint(2, 5))
        ]
        scores = [generator.random() for _ in responses]
        groups.append(kvpref.Group(responses, scores=scores, id=f"made:{index + 1}"))
    return groups


def outcome(trainer: kvpref.PreferenceTrainer, resume_from: str | None = None) -> dict[str, Any]:
    """Train; the losses, and the trained weights before and after."""
    names = [name for name, item in trainer.model.named_parameters() if item.requires_grad]
    before = weights_of(trainer, names)
    trainer.train(resume_from_checkpoint=resume_from)
    losses = [line[key] for line in trainer.state.log_history for key in ("loss", "eval_loss") if key in line]
    return {"losses": losses, "before": before, "after": weights_of(trainer, names)}


def weights_of(trainer: kvpref.PreferenceTrainer, names: list[str]) -> dict[str, torch.Tensor]:
    """Copies of the whole weights."""
    own = dict(trainer.model.named_parameters())
    with gathered(own.values()):
        return {name: own[name].detach().clone() for name in names}


def train_in_float64() -> None:
    """Let DeepSpeed, in this process, keep and reduce float64 in float64.

    It has the operations, but rounds what the optimizer sees to float32, so kvpref refuses such models. Results in
    float32 could not tell a small mistake from rounding.
    """
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from kvpref.training import checks

    engine: Any = DeepSpeedEngine
    engine.get_data_types = lambda _: (torch.float64, torch.float64)
    optimizer: Any = ZeROOptimizer
    optimizer._configure_master_weights = lambda *_, **__: torch.float64
    for kind in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        _widen_communication(kind)
    checks.check_weights = lambda *_: None  # type: ignore[assignment]


def _widen_communication(kind: Any) -> None:
    init = kind.__init__

    def wide(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.communication_data_type = torch.float64
        (bucket,) = self.ipg_buckets.values()
        if isinstance(bucket.buffer, torch.Tensor):
            bucket.buffer = bucket.buffer.double()
        self.ipg_buckets = {torch.float64: bucket}

    kind.__init__ = wide

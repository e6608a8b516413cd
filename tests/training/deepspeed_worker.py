"""Run under torchrun by test_deepspeed: runs through DeepSpeed, whose outcomes rank 0 writes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed_runs import (
    ADAPTER_OFF,
    ADAPTER_OFF_SETTINGS,
    ALL_CASES,
    CASES,
    RESUMED,
    Case,
    deepspeed_config,
    make_trainer,
    moved_trainer,
    outcome,
    second_model_trainer,
    train_in_float64,
)
from preference_runs import make_args, make_groups, make_model
from transformers import AutoModelForCausalLM
from two_processes import leave_together

import kvpref


def main(output: Path, which: str, num_steps: int) -> None:
    facts: dict[str, Any] = {"pieces": sizes_of_loaded(output)}
    for stage, bf16 in ((2, True), (3, False)):
        facts[f"first loss {stage} {bf16}"] = first_loss(output / f"first-{stage}-{bf16}", stage, bf16)
    facts["second model"] = outcome(second_model_trainer(output, int(os.environ["WORLD_SIZE"]), 3))["losses"]
    facts["float64"] = refusal(output)
    train_in_float64()
    for case in {"some": CASES, "all": ALL_CASES}[which]:
        write(outcome(trainer_of(case, output, num_steps)), output / f"{case.name}.pt")
    write(outcome(trainer_of(ADAPTER_OFF, output, 3, **ADAPTER_OFF_SETTINGS)), output / f"{ADAPTER_OFF.name}.pt")
    facts["whole"], facts["resumed"] = interrupted(output)
    write(facts, output / "facts.pt")


def save_two_steps(output: Path) -> None:
    """Each stage in float32, in which DeepSpeed converts checkpoints."""
    for stage in (1, 2, 3):
        float32_trainer(output, stage, 2, save_strategy="steps", save_steps=2).train()


def resume(output: Path) -> None:
    """On another number of ranks."""
    for stage in (1, 2):
        found = outcome(float32_trainer(output, stage, 4), str(output / f"moved-{stage}" / "checkpoint-2"))
        write(found["losses"], output / f"moved-{stage}.pt")
    try:
        float32_trainer(output, 3, 4).train(resume_from_checkpoint=str(output / "moved-3" / "checkpoint-2"))
    except kvpref.InputError as error:
        write(str(error), output / "moved-3.pt")


def float32_trainer(output: Path, stage: int, num_steps: int, **settings: Any) -> kvpref.PreferenceTrainer:
    return moved_trainer(output / f"moved-{stage}", int(os.environ["WORLD_SIZE"]), num_steps, stage, **settings)


def trainer_of(case: Case, output: Path, num_steps: int, **settings: Any) -> kvpref.PreferenceTrainer:
    num_ranks = int(os.environ["WORLD_SIZE"])
    return make_trainer(case, output / case.name, num_ranks, deepspeed=True, num_steps=num_steps, **settings)


def write(values: Any, path: Path) -> None:
    if dist.get_rank() == 0:
        torch.save(values, path)


def sizes_of_loaded(output: Path) -> list[int]:
    """How many numbers of each weight a rank holds in the model that ZeRO-3 loads."""
    folder = output / "model"
    args = make_args(str(output / "loaded"), deepspeed=deepspeed_config(3))
    if args.process_index == 0:
        make_model().float().save_pretrained(folder)
        make_model(seed=1).float().save_pretrained(output / "second")
    dist.barrier()
    return [weight.numel() for weight in AutoModelForCausalLM.from_pretrained(folder).parameters()]


def first_loss(output: Path, stage: int, bf16: bool) -> float:
    """Of DPO; the optimizer is DeepSpeed's own, whose learning rate starts high, and steps are cut in several."""
    config = deepspeed_config(
        stage, bf16={"enabled": "auto"}, optimizer={"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}
    )
    config["zero_allow_untested_optimizer"] = True
    args = make_args(str(output), deepspeed=config, bf16=bf16, max_steps=1, optim="adamw_torch")
    trainer = kvpref.PreferenceTrainer(make_model().float(), args, make_groups(11))
    return float(outcome(trainer)["losses"][0])


def refusal(output: Path) -> str:
    try:
        trainer_of(CASES[0], output, 1)
    except kvpref.InputError as error:
        return str(error)
    return ""


def interrupted(output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run of three steps, and one that goes on after two; the last model is saved."""
    whole = outcome(trainer_of(RESUMED, output / "whole", 3))
    trainer_of(RESUMED, output, 2, save_strategy="steps", save_steps=2).train()
    resumed = trainer_of(RESUMED, output, 3)
    found = outcome(resumed, str(output / RESUMED.name / "checkpoint-2"))
    resumed.save_model(str(output / "saved"))
    return whole, found


if __name__ == "__main__":
    jobs = {"save": save_two_steps, "resume": resume}
    if sys.argv[2] in jobs:
        jobs[sys.argv[2]](Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    leave_together()

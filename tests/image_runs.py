"""A run of the trainer in which, of two ranks, only one has images."""

from __future__ import annotations

import torch
from vision_models import tiny_vision_model, vision_groups

import kvpref
from kvpref.parallel.whole_weights import whole


def image_groups() -> list[kvpref.Group]:
    """Groups whose order puts all images on the first of two ranks."""
    groups = vision_groups("qwen2_5_vl").groups
    with_images = [group for group in groups if group.sequences[0].images and len(group) == 2]
    without = [group for group in groups if not group.sequences[0].images]
    return [with_images[0], without[0]]


def train_with_images(output: str, schedule: str, loss: str = "cpo", fsdp: str | None = None) -> None:
    """Train the tiny model on both groups of each step, and leave its weights in a file."""
    args = kvpref.PreferenceTrainingArguments(
        output_dir=f"{output}/run",
        loss=loss,
        fsdp=fsdp,
        schedule=schedule,
        max_tokens_per_chunk=16 if schedule == "bounded" else None,
        max_steps=2,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        warmup_steps=0,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        bf16=False,
    )
    world_size = args.world_size
    args.per_device_train_batch_size = 2 // world_size
    model = tiny_vision_model("qwen2_5_vl", torch.float64)
    kvpref.PreferenceTrainer(model, args, labelled(image_groups())).train()
    weights = {name: whole(weight) for name, weight in model.named_parameters()}
    if args.process_index == 0:
        torch.save(weights, f"{output}/{world_size}.pt")


def labelled(groups: list[kvpref.Group]) -> list[kvpref.Group]:
    """Labelled: the first response of each is the better one."""
    return [kvpref.Group(group.sequences, labels=[True, False], id=group.id) for group in groups]

"""Padded batches of questions about images, as data collators make them: each row's images given with it."""

from __future__ import annotations

from typing import Any

import torch
from padded_batches import IGNORED
from vision_families import FAMILIES, build_vision_processor, placeholder_id
from vision_models import VisionPrompt, messages, prompts_of_all_kinds


def padded_call(name: str, side: str = "right", prompts: list[VisionPrompt] | None = None) -> dict[str, Any]:
    """What a family's model is called with: a row per response, with labels that count the responses."""
    processor = build_vision_processor(name)
    texts, images, lengths = [], [], []
    for prompt in prompts_of_all_kinds() if prompts is None else prompts:
        question = processor.apply_chat_template(messages(prompt), tokenize=False, add_generation_prompt=True)
        for response in prompt.responses:
            texts.append(question + response)
            images.append(list(prompt.pictures))
            lengths.append(len(response.encode()))  # one token per byte
    made = processor(
        text=texts,
        images=images if any(images) else None,
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )
    inputs = dict(made)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for kind in ("token_type_ids", "mm_token_type_ids"):
        inputs.pop(kind, None)
        if kind in FAMILIES[name].token_types:
            inputs[kind] = (ids == placeholder_id(name)).long()
    labels = torch.full_like(ids, IGNORED)
    for row, length in enumerate(lengths):
        scored = mask[row].nonzero().squeeze(1)[-length:]
        labels[row, scored] = ids[row, scored]
    return {**inputs, "labels": labels}

"""Tiny vision-language models with their processors and chat templates, made-up pictures, and groups of them.

No hub: processors are built from configs and a tokenizer of one token per byte. `vision_groups` uses the processor
plainly, so that tests of the engine need none of kvpref's own reading of data; with each sequence come the inputs that
the model's own forward takes, for `naive_vision_logps`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from oracle import Result, grads_of, loss_weights, precision
from PIL import Image as Pictures
from PIL import ImageDraw
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel
from vision_families import FAMILIES, VisionFamily, build_vision_config, build_vision_processor, placeholder_id

import kvpref

Picture = Pictures.Image
NOT_FOR_THE_TOWER = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")
_COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange", "purple")


class VisionPrompt(NamedTuple):
    """A question about pictures, and the responses to it."""

    question: str
    pictures: tuple[Picture, ...]
    responses: tuple[str, ...]


class VisionGroups(NamedTuple):
    """Groups, and for each of their sequences, in order, what the model's own forward takes (batch 1)."""

    groups: list[kvpref.Group]
    inputs: list[dict[str, Any]]


def tiny_vision_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a family in training mode, with eager attention in text and tower."""
    config = build_vision_config(name)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager")
        randomise(model)
    trained: PreTrainedModel = model.to(dtype).train()
    return trained


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights far enough from their trivial values to matter, by name, from torch's random state."""
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape)
        if parameter.ndim > 1:
            parameter.copy_((0.3 if re.search(r"(q_|k_|qkv|query|key|router)", name) else 0.1) * noise)
        else:
            start = torch.nan_to_num(parameter, nan=0.0, posinf=0.0, neginf=0.0).clamp(-20, 20)
            parameter.copy_(start + 0.2 * noise)


def picture(seed: int, width: int = 40, height: int = 32) -> Picture:
    """A made-up picture: a few coloured shapes, different for every seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw_number(stop: int) -> int:
        return int(torch.randint(0, stop, (), generator=generator))

    made = Pictures.new("RGB", (width, height), _COLOURS[seed % len(_COLOURS)])
    canvas = ImageDraw.Draw(made)
    for kind in (canvas.ellipse, canvas.rectangle, canvas.ellipse):
        left, top = draw_number(width // 2), draw_number(height // 2)
        box = (left, top, left + 4 + draw_number(width // 2), top + 4 + draw_number(height // 2))
        kind(box, fill=_COLOURS[draw_number(len(_COLOURS))])
    return made


def prompts_of_all_kinds() -> list[VisionPrompt]:
    """One image, none, two of different sizes, and the first image again under another question."""
    first = picture(1)
    return [
        VisionPrompt("What is it?", (first,), ("A cat.", "A dog")),
        VisionPrompt("Hello", (), ("Hi", "Hey, you")),
        VisionPrompt("Compare.", (picture(2, 64, 36), picture(3, 30, 52)), ("Bigger", "Smaller.", "Sma", "Equal")),
        VisionPrompt("And its colour?", (first,), ("Red", "Blue.")),
    ]


def messages(prompt: VisionPrompt) -> list[dict[str, Any]]:
    """The prompt as a chat: its images first, then the question."""
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in prompt.pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt.question}]}]


def vision_groups(name: str, prompts: Sequence[VisionPrompt] | None = None) -> VisionGroups:
    """Groups of a family's processor, by default of `prompts_of_all_kinds`.

    Args:
        name: Of the family.
        prompts: What to ask, and what is answered.
    """
    processor = build_vision_processor(name)
    groups, inputs = [], []
    for prompt in prompts_of_all_kinds() if prompts is None else prompts:
        text = processor.apply_chat_template(messages(prompt), tokenize=False, add_generation_prompt=True)
        made = processor(text=text, images=list(prompt.pictures) or None, return_tensors="pt")
        prompt_ids: list[int] = made["input_ids"][0].tolist()
        images = _placed(name, processor, prompt, prompt_ids)
        responses = [processor.tokenizer(one, add_special_tokens=False)["input_ids"] for one in prompt.responses]
        groups.append(kvpref.Group([_sequence(prompt_ids, response, images) for response in responses]))
        inputs.extend(own_inputs(FAMILIES[name], made, response) for response in responses)
    return VisionGroups(groups, inputs)


def _sequence(prompt_ids: list[int], response: list[int], images: tuple[Any, ...]) -> kvpref.Sequence:
    scored = (False,) * len(prompt_ids) + (True,) * len(response)
    return kvpref.Sequence((*prompt_ids, *response), scored, images=images)


def _placed(name: str, processor: Any, prompt: VisionPrompt, prompt_ids: list[int]) -> tuple[kvpref.PlacedImage, ...]:
    """The images of a prompt and where they stand; all are one where the processor treats them together."""
    if not prompt.pictures:
        return ()
    units = [prompt.pictures] if FAMILIES[name].together else [(one,) for one in prompt.pictures]
    token_id = placeholder_id(name)
    places = [index for index, token in enumerate(prompt_ids) if token == token_id]
    placed = []
    for unit in units:
        marks = FAMILIES[name].mark * len(unit)
        alone = processor(text=marks, images=list(unit), return_tensors="pt")
        num_tokens = int((alone["input_ids"] == token_id).sum())
        tower = {name: value for name, value in alone.items() if name not in NOT_FOR_THE_TOWER}
        image = kvpref.Image(
            key=_digest(unit), token_id=token_id, num_tokens=num_tokens, read=partial(dict[str, Any], tower)
        )
        placed.append(kvpref.PlacedImage(image, runs_of(places[:num_tokens])))
        places = places[num_tokens:]
    assert not places, f"{len(places)} placeholders too many"
    return tuple(placed)


def runs_of(places: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Positions in order as [first, stop) runs."""
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1][1] += 1
        else:
            runs.append([place, place + 1])
    return tuple((first, stop) for first, stop in runs)


def _digest(pictures: Sequence[Picture]) -> str:
    return hashlib.sha256(b"".join(repr(one.size).encode() + one.tobytes() for one in pictures)).hexdigest()


def own_inputs(family: VisionFamily, prompt: Mapping[str, Any], response: list[int]) -> dict[str, Any]:
    """What the model's own forward takes for a prompt as the processor made it, and a response."""
    inputs = {name: value for name, value in prompt.items() if name not in NOT_FOR_THE_TOWER}
    ids = torch.cat([prompt["input_ids"], torch.tensor([response], dtype=torch.int64)], dim=1)
    inputs.update(input_ids=ids, attention_mask=torch.ones_like(ids))
    for name, value_of_response in (("mm_token_type_ids", 0), ("token_type_ids", family.response_type)):
        if name in family.token_types:
            types = prompt.get(name, torch.zeros_like(prompt["input_ids"]))
            inputs[name] = torch.cat([types, torch.full((1, len(response)), value_of_response)], dim=1)
    return inputs


def naive_vision_logps(model: nn.Module, made: VisionGroups) -> torch.Tensor:
    """(num_scored_tokens,) log-probs of the scored tokens, each sequence alone in the model's own forward."""
    sequences = [sequence for group in made.groups for sequence in group.sequences]
    shares = []
    for sequence, inputs in zip(sequences, made.inputs, strict=True):
        logits = model(**_floats_as(model, inputs), use_cache=False).logits[0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        ids = inputs["input_ids"][0]
        logps = logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        shares.append(logps[torch.tensor(sequence.scored[1:])])
    return torch.cat(shares)


def naive_vision_run(model: nn.Module, made: VisionGroups) -> Result:
    """Log-probs and every gradient, tower and projector included, of `loss_weights` times the log-probs."""
    model.zero_grad(set_to_none=True)
    with precision(model):
        logps = naive_vision_logps(model, made)
        (logps * loss_weights(made.groups).to(logps)).sum().backward()
    result = Result(logps.detach(), grads_of(model))
    model.zero_grad(set_to_none=True)
    return result


def _floats_as(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    dtype = next(model.parameters()).dtype
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }

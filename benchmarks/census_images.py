"""One vision-language model of the census: every mode against the model's own forward with its own pixel inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from census_check import Subject, check, verdict_of
from census_image_inputs import Inputs, cross_attention_mask, joined
from census_image_settings import END, IMAGE, IMAGE_FAMILIES, IMAGE_SIZES, START, ImageFamily
from census_models import MAX_WEIGHTS, randomise, shrunk
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

import kvpref


class Case(NamedTuple):
    """Groups, and the inputs of the model's own forward for each of their sequences."""

    groups: list[kvpref.Group]
    inputs: list[Inputs]


class Picture(NamedTuple):
    """An image as a family's tower reads it."""

    key: str
    inputs: Inputs
    num_tokens: int


def build_with_tower(name: str) -> PreTrainedModel:
    """A random model of a registry entry, in evaluation mode."""
    family = IMAGE_FAMILIES.get(name, ImageFamily())
    config = shrunk(CONFIG_MAPPING[name.partition(":")[0]], family.changes, IMAGE_SIZES)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        made = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    num_weights = sum(parameter.numel() for parameter in made.parameters())
    if num_weights > MAX_WEIGHTS:
        raise ValueError(f"{num_weights} weights: the census knows too few of its sizes")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    randomise(model)
    built: PreTrainedModel = model.eval()
    return built


def feature_rows(model: PreTrainedModel, inputs: Inputs) -> int:
    """Number of placeholders of an image."""
    features = getattr(model, "get_image_features", None) or model.model.get_image_features
    others = (
        {"vision_feature_layer": model.config.vision_feature_layers} if model.config.model_type == "vipllava" else {}
    )
    with torch.no_grad():
        found = features(**inputs, **others, return_dict=True)
    rows = getattr(found, "pooler_output", found)
    rows = found.last_hidden_state if rows is None else rows
    rows = rows if isinstance(rows, torch.Tensor) else torch.cat(list(rows))
    return rows.numel() // rows.shape[-1]


def case_with_images(name: str, model: PreTrainedModel) -> Case:
    """One image, none, two of different sizes, the first image again, and another image under the first's text."""
    family = IMAGE_FAMILIES[name]
    generator = torch.Generator().manual_seed(3)
    vision = getattr(model.config, "vision_config", None)

    def draw(length: int) -> list[int]:
        return torch.randint(5, IMAGE - 4, (length,), generator=generator).tolist()

    pictures = []
    for index, size in enumerate((0, 1, 0)):
        inputs = family.inputs(vision, size, generator)
        num_tokens = family.placeholders or feature_rows(model, inputs)
        pictures.append(Picture(f"picture {index}", inputs, num_tokens))
    first_text, response = (draw(5), draw(4)), draw(6)
    plans = [
        ((pictures[0],), first_text, [response, draw(3)]),
        ((), (draw(4), draw(3)), [draw(5), draw(1), draw(4), draw(2)]),
        ((pictures[1], pictures[0]), (draw(3), draw(5)), [draw(4), draw(7), draw(1), draw(3)]),
        ((pictures[2],), first_text, [response, draw(5)]),
        ((pictures[0],), (first_text[0], draw(3)), [draw(2), draw(3)]),
    ]
    plans[1][2][2][:1] = plans[1][2][0][:1]
    plans[2][2][1][:3] = plans[2][2][0][:3]
    groups, inputs_of_all = [], []
    for images, (before, after), responses in plans:
        prompt, runs = _prompt(family, images, before, after)
        placed = tuple(
            kvpref.PlacedImage(kvpref.Image(one.key, IMAGE, one.num_tokens, partial(dict, one.inputs)), run)
            for one, run in zip(images, runs, strict=True)
        )
        groups.append(kvpref.Group([_sequence(prompt, one, placed) for one in responses]))
        inputs_of_all += [_own_inputs(family, images, prompt, one) for one in responses]
    return Case(groups, inputs_of_all)


def _sequence(prompt: list[int], response: list[int], placed: tuple[kvpref.PlacedImage, ...]) -> kvpref.Sequence:
    scored = (False,) * len(prompt) + (True,) * len(response)
    return kvpref.Sequence((*prompt, *response), scored, images=placed)


def _prompt(
    family: ImageFamily, images: Sequence[Picture], before: list[int], after: list[int]
) -> tuple[list[int], list[tuple[tuple[int, int], ...]]]:
    """The prompt's tokens, and the positions of each image's placeholders."""
    prompt, places = list(before), []
    for image in images:
        prompt.append(START)
        half = image.num_tokens // 2 if family.split else 0
        runs = []
        for length in filter(None, (half, image.num_tokens - half)):
            prompt += [7] * bool(runs)
            runs.append((len(prompt), len(prompt) + length))
            prompt += [IMAGE] * length
        prompt += [END, 9]
        places.append(tuple(runs))
    return [*prompt, *after], places


def _own_inputs(family: ImageFamily, images: Sequence[Picture], prompt: list[int], response: list[int]) -> Inputs:
    ids = torch.tensor([[*prompt, *response]])
    inputs = {**joined([one.inputs for one in images], family.join)} if images else {}
    inputs.update(input_ids=ids, attention_mask=torch.ones_like(ids))
    if "aspect_ratio_mask" in inputs:
        num_tiles = inputs["aspect_ratio_mask"][0].sum(-1).tolist()
        inputs["cross_attention_mask"] = cross_attention_mask([*prompt, *response], IMAGE, num_tiles)
    if family.token_types:
        types = (ids == IMAGE).long()
        types[:, len(prompt) :] = family.response_type
        if family.response_type:
            types[:, : len(prompt)] = 0
        inputs[family.token_types] = types
    return inputs


def own_token_logps(model: PreTrainedModel, sequence: kvpref.Sequence, inputs: Inputs) -> torch.Tensor:
    """Log-probs of one sequence's scored tokens in the model's own forward."""
    dtype = next(model.parameters()).dtype
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    logits = model(**cast, use_cache=False).logits[0]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logps = logits[:-1].log_softmax(-1).gather(1, inputs["input_ids"][0, 1:, None]).squeeze(1)
    return logps[torch.tensor(sequence.scored[1:])]


def check_images(name: str, modes: tuple[str, ...], *, unlisted: bool = False) -> dict[str, Any]:
    """One line of the census with images: on groups with images, and on a batch without any."""
    row = check(name, modes, unlisted=unlisted, subject=subject)
    if "runs" not in row or row["verdict"] not in ("exact", "wrong"):
        return row
    text = check(name, modes[:1], unlisted=unlisted, subject=partial(subject, with_images=False))
    runs = {**row["runs"], **{f"text/{run}": found for run, found in text["runs"].items()}}
    return {**row, "runs": runs, **verdict_of(runs)}


def subject(name: str, *, with_images: bool = True) -> Subject:
    """A model, and groups with and without images, or only without."""
    if name not in IMAGE_FAMILIES:
        raise ValueError("the census knows no images for it")
    model = build_with_tower(name)
    case = case_with_images(name, model)
    moves = _image_moves(model, case)
    pairs = zip([sequence for group in case.groups for sequence in group.sequences], case.inputs, strict=True)
    kept = [pair for pair in pairs if with_images or not pair[0].images]
    groups = [group for group in case.groups if with_images or not group.sequences[0].images]

    def logps(model: PreTrainedModel) -> torch.Tensor:
        return torch.cat([own_token_logps(model, *pair) for pair in kept])

    return Subject(model, groups, logps, moves)


@torch.no_grad()
def _image_moves(model: PreTrainedModel, case: Case) -> float:
    """How far another image moves the log-probs of a response under the same text."""
    other = sum(len(group) for group in case.groups[:3])
    moved = [
        own_token_logps(model, group.sequences[0], case.inputs[index])
        for group, index in ((case.groups[0], 0), (case.groups[3], other))
    ]
    return float(f"{(moved[0] - moved[1]).abs().max().item():.2e}")

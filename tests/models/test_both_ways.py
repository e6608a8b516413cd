"""Which tokens see later ones: against the masks that transformers' own models make for images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_layouts import counts
from transformers import AutoConfig
from transformers.masking_utils import (
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma4 import modeling_gemma4
from vision_models import tiny_vision_model

import kvpref
from kvpref import Group, Image, PlacedImage, Sequence, UnsupportedModelError
from kvpref.models.attention import mask_function
from kvpref.models.attention_shapes import attention_shapes
from kvpref.models.both_ways import NOWHERE, BothWays, both_ways_of, padded_spans
from kvpref.models.masks import read_rule
from kvpref.plan.passes import Reads
from kvpref.prefix.rules import CAUSAL, Rule
from kvpref.prefix.shapes import blocks_under

NUM_TOKENS = 24
WINDOW = 5
FIRST, SECOND = (3, 12), (14, 16)
"""Runs of two images: one longer than the window, one shorter."""
RUNS = {"images": (FIRST, SECOND), "prompts": ((0, 18),)}


class OfConfig:
    """A model of which nothing but the config is asked."""

    def __init__(self, config: Any) -> None:
        self.config = config


def config_of(family: str, **text: Any) -> Any:
    kind = {"text_config": {"model_type": "gemma2", **text}} if family == "paligemma" else {"text_config": text}
    config = AutoConfig.for_model(family, **kind)
    config.text_config.sliding_window = text["sliding_window"]
    return config


def own_masks(family: str, config: Any) -> dict[str, torch.Tensor]:
    """(T, T) bool per kind of layers, as the family's own model makes them."""
    text = config.text_config
    text._attn_implementation = "sdpa"
    types = torch.zeros(1, NUM_TOKENS, dtype=torch.int64)
    given = {
        "config": text,
        "inputs_embeds": torch.zeros(1, NUM_TOKENS, 4),
        "attention_mask": torch.ones(1, NUM_TOKENS, dtype=torch.int64),
        "past_key_values": None,
        "position_ids": torch.arange(NUM_TOKENS).unsqueeze(0),
    }
    if family == "paligemma":
        types[0, 18:] = 1
        blocks = torch.where(types == 0, 0, -1)
        made = {
            "full_attention": create_causal_mask(**given, block_sequence_ids=blocks),
            "sliding_attention": create_sliding_window_causal_mask(**given, block_sequence_ids=blocks),
        }
    else:
        for first, stop in RUNS["images"]:
            types[0, first:stop] = 1
        module: Any = {"gemma3": modeling_gemma3, "gemma4": modeling_gemma4}[family]
        blocks = module.get_block_sequence_ids_for_mask(types, device=torch.device("cpu"))
        made = module.create_masks_for_vision_model(**given, block_sequence_ids=blocks)
    causal = torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).tril()
    return {kind: causal if mask is None else mask[0, 0] for kind, mask in made.items()}


def sequence() -> Sequence:
    ids = [9 if any(a <= place < b for a, b in RUNS["images"]) else 1 for place in range(NUM_TOKENS)]
    images = [
        PlacedImage(Image(key=str(a), token_id=9, num_tokens=b - a, read=dict), ((a, b),)) for a, b in RUNS["images"]
    ]
    return Sequence(ids, [place >= 18 for place in range(NUM_TOKENS)], images)


def batch_of(config: Any) -> kvpref.Batch:
    return kvpref.collate([Group([sequence()])], reads=Reads(spans=both_ways_of(config).spans))


CASES = [(family, window) for family in ("gemma3", "gemma4", "paligemma") for window in (WINDOW, 1000)]


def made(family: str, window: int) -> Any:
    settings = {"use_bidirectional_attention": "vision"} if family == "gemma4" else {}
    return config_of(family, sliding_window=window, **settings)


@pytest.mark.parametrize(("family", "window"), CASES)
def test_rules_say_what_the_model_masks(family: str, window: int) -> None:
    """Also where the window is longer than all sequences, and reads as causal."""
    config = made(family, window)
    (layout,) = batch_of(config).plan("two_pass").passes[0].layouts
    masks = {"full_attention": causal_mask_function, "sliding_attention": sliding_window_causal_mask_function(window)}
    for kind, expected in own_masks(family, config).items():
        rule = both_ways_of(config).applied(read_rule(masks[kind], NUM_TOKENS), masks[kind])
        assert torch.equal(counts(blocks_under(layout, rule), [NUM_TOKENS]), expected.double()), (kind, rule)


@pytest.mark.parametrize(("family", "window"), CASES)
def test_padded_rows_are_masked_as_the_model_does(family: str, window: int) -> None:
    config = made(family, window)
    (item,) = batch_of(config).plan("padded").passes
    masks = {"full_attention": causal_mask_function, "sliding_attention": sliding_window_causal_mask_function(window)}
    for kind, expected in own_masks(family, config).items():
        with padded_spans(OfConfig(config), item):  # type: ignore[arg-type]
            found = mask_function(
                sdpa_mask,
                batch_size=1,
                q_length=NUM_TOKENS,
                kv_length=NUM_TOKENS,
                mask_function=masks[kind],
                attention_mask=torch.ones(1, NUM_TOKENS, dtype=torch.bool),
                allow_is_causal_skip=True,
            )
        if found is None:
            found = torch.ones(1, 1, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).tril()
        assert torch.equal(found[0, 0], expected), kind  # type: ignore[index]


def test_gemma_4_sees_both_ways_only_where_its_config_says_so() -> None:
    assert both_ways_of(config_of("gemma4", sliding_window=WINDOW)) == NOWHERE
    assert both_ways_of(AutoConfig.for_model("llava")) == NOWHERE


def test_masks_of_other_kinds_with_images_are_refused() -> None:
    both = BothWays(spans="images")
    with pytest.raises(UnsupportedModelError, match="besides a chunk mask"):
        both.applied(Rule("chunk", 4), causal_mask_function)
    assert NOWHERE.applied(CAUSAL, causal_mask_function) is CAUSAL


@pytest.mark.parametrize(
    ("family", "full", "window"),
    [
        ("gemma3", Rule("causal", bidirectional=True), Rule("window", WINDOW, bidirectional=True)),
        ("gemma4", CAUSAL, Rule("window", WINDOW, bidirectional=True)),
        (
            "paligemma",
            Rule("causal", bidirectional=True),
            Rule("window", WINDOW, bidirectional=True, whole_spans=True),
        ),
    ],
)
def test_pairs_that_images_see_besides_are_counted_by_kind_of_layer(family: str, full: Rule, window: Rule) -> None:
    found = both_ways_of(made(family, WINDOW))
    assert found.with_spans(CAUSAL, is_full=True) == full
    assert found.with_spans(Rule("window", WINDOW), is_full=False) == window


def test_the_shape_of_a_model_says_which_layers_see_both_ways() -> None:
    kinds = attention_shapes(tiny_vision_model("gemma3"))
    assert {kind.rule: kind.num_layers for kind in kinds} == {
        Rule("window", 6, bidirectional=True): 2,
        Rule("causal", bidirectional=True): 1,
    }

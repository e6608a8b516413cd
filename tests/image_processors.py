"""Small processors of the kinds that transformers has, with a tokenizer of one token per byte; no hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import transformers
from chat_families import build_byte_tokenizer
from vision_families import _without_videos


class Kind(NamedTuple):
    """What a processor is made of.

    Attributes:
        name: Of its class, before ``Processor``.
        image_processor: Name of the class before ``ImageProcessorPil``, and settings.
        settings: Of the processor.
        tokens: Special tokens that the tokenizer knows by name.
        specials: Further special tokens.
        mark: What its template writes for an image.
        template: Whether it has one.
    """

    name: str
    image_processor: tuple[str, Mapping[str, Any]]
    settings: Mapping[str, Any] = {}
    tokens: Mapping[str, str] = {}
    specials: tuple[str, ...] = ()
    mark: str = "<image>"
    template: bool = True


_SQUARE = {"height": 32, "width": 32}
_QWEN = {"size": {"shortest_edge": 256, "longest_edge": 4096}, "patch_size": 8, "merge_size": 2}
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
_TILES = (
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)),
)
_PINPOINTS = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}

KINDS = {
    "llava": Kind(
        "Llava", ("CLIP", {"size": {"shortest_edge": 32}, "crop_size": _SQUARE}), {"patch_size": 8}, {}, ("<image>",)
    ),
    "llava_next": Kind(
        "LlavaNext",
        ("LlavaNext", {"size": {"shortest_edge": 32}, "crop_size": _SQUARE, **_PINPOINTS}),
        {"patch_size": 8, "vision_feature_select_strategy": "full"},
        {},
        ("<image>",),
    ),
    "llava_onevision": Kind(
        "LlavaOnevision",
        ("LlavaOnevision", {"size": _SQUARE, **_PINPOINTS}),
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        {},
        ("<image>", "<video>"),
    ),
    "qwen2_vl": Kind("Qwen2VL", ("Qwen2VL", _QWEN), {}, {}, _QWEN_TOKENS, _QWEN_MARK),
    "qwen2_5_vl": Kind("Qwen2_5_VL", ("Qwen2VL", _QWEN), {}, {}, _QWEN_TOKENS, _QWEN_MARK),
    "qwen3_vl": Kind("Qwen3VL", ("Qwen2VL", _QWEN), {}, {}, _QWEN_TOKENS, _QWEN_MARK),
    "glm4v": Kind(
        "Glm4v",
        ("Glm4v", {"size": {"shortest_edge": 512, "longest_edge": 8192}, "patch_size": 8, "merge_size": 2}),
        {},
        {},
        ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"),
        "<|begin_of_image|><|image|><|end_of_image|>",
    ),
    "gemma3": Kind(
        "Gemma3",
        ("Gemma3", {"size": _SQUARE}),
        {"image_seq_length": 4},
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        mark="<start_of_image>",
    ),
    "paligemma": Kind(
        "PaliGemma",
        ("Siglip", {"size": _SQUARE, "image_seq_length": 4}),
        {},
        {"image_token": "<image>"},
        template=False,
    ),
    "idefics2": Kind(
        "Idefics2",
        ("Idefics2", {"size": {"shortest_edge": 16, "longest_edge": 32}}),
        {"image_seq_len": 4},
        {},
        ("<fake_token_around_image>", "<image>", "<end_of_utterance>"),
    ),
    "idefics3": Kind(
        "Idefics3",
        ("Idefics3", {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}),
        {"image_seq_len": 4},
        {},
        (*_TILES, "<end_of_utterance>"),
    ),
    "internvl": Kind(
        "InternVL",
        ("GotOcr2", {"size": _SQUARE, "min_patches": 1, "max_patches": 4}),
        {"image_seq_length": 4},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        mark="<IMG_CONTEXT>",
    ),
    "pixtral": Kind(
        "Pixtral",
        ("Pixtral", {"size": {"longest_edge": 64}, "patch_size": {"height": 8, "width": 8}}),
        {"patch_size": 8},
        {},
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        "[IMG]",
    ),
    "llama4": Kind(
        "Llama4",
        ("Llama4", {"size": _SQUARE, "max_patches": 4}),
        {"patch_size": 8},
        {},
        ("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
        "<|image|>",
    ),
    "mllama": Kind(
        "Mllama",
        ("Mllama", {"size": _SQUARE, "max_image_tiles": 4}),
        {},
        {},
        ("<|image|>", "<|python_tag|>"),
        "<|image|>",
    ),
    "aya_vision": Kind(
        "AyaVision",
        ("GotOcr2", {"size": _SQUARE, "min_patches": 1, "max_patches": 4}),
        {"patch_size": 16, "img_size": 32},
        {},
        ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"),
    ),
}


def build_processor(name: str) -> Any:
    """The processor of a kind; skips the test where it needs torchvision."""
    try:
        return _build(KINDS[name])
    except ImportError:
        pytest.skip(f"the processor of {name} needs torchvision here")


def _build(kind: Kind) -> Any:
    """A processor whose template writes a turn as ``[role] content``, texts and parts alike."""
    image_processor = getattr(transformers, f"{kind.image_processor[0]}ImageProcessorPil", None)
    if image_processor is None:
        image_processor = getattr(transformers, f"{kind.image_processor[0]}ImageProcessor")
    specials = {"<s>", "</s>", "<pad>", *kind.tokens.values(), *kind.specials}
    tokenizer = build_byte_tokenizer(
        specials, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=dict(kind.tokens)
    )
    template = (
        "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {% if message.content is string %}"
        "{{ message.content }}{% else %}{% for part in message.content %}"
        f"{{% if part.type == 'image' %}}{kind.mark}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
        "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return _without_videos(getattr(transformers, f"{kind.name}Processor"))(
        image_processor=image_processor(**kind.image_processor[1]),
        tokenizer=tokenizer,
        **({"chat_template": template} if kind.template else {}),
        **kind.settings,
    )

"""Families of vision-language models in small: config, tokens, processor, and a chat template in the family's style."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from chat_families import build_byte_tokenizer
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class VisionFamily:
    """What a tiny model of a family and its processor are made of."""

    text: Settings
    """Of the config of its language model."""

    vision: Settings
    """Of the config of its tower."""

    config: Settings = field(default_factory=dict)
    """Of the config around both."""

    tokens: Mapping[str, str]
    """Special tokens by the name under which the config keeps their ids."""

    named: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by the name under which the tokenizer keeps them."""

    specials: tuple[str, ...] = ()
    """Further special tokens."""

    image_processor: tuple[str, Settings]
    """Class and settings."""

    processor: tuple[str, Settings]
    """Class and settings."""

    template: str
    """Chat template."""

    mark: str
    """What stands for an image in text before the processor sees it."""

    placeholder: str
    """What stands for a row of an image's features afterwards."""

    token_types: tuple[str, ...] = ()
    """Token types that the model's own forward asks for."""

    response_type: int = 0
    """`token_type_ids` of a response."""

    together: bool = False
    """Whether the processor treats the images of one prompt together."""


def build_vision_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One token per byte, and the family's special tokens."""
    family = FAMILIES[name]
    specials = {"<pad>", "<s>", "</s>", *family.tokens.values(), *family.named.values(), *family.specials}
    return build_byte_tokenizer(
        specials, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=dict(family.named)
    )


def build_vision_config(name: str) -> PreTrainedConfig:
    """The config of a family's tiny model; its vocabulary is the tokenizer's."""
    family, tokenizer = FAMILIES[name], build_vision_tokenizer(name)
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in family.tokens.items()}
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **family.text,
    }
    return AutoConfig.for_model(name, text_config=text, vision_config=dict(family.vision), **family.config, **ids)


def build_vision_processor(name: str) -> Any:
    """The processor of a family, with its chat template."""
    family = FAMILIES[name]
    image_processor = getattr(transformers, family.image_processor[0])(**family.image_processor[1])
    kind = _without_videos(getattr(transformers, family.processor[0]))
    tokenizer = build_vision_tokenizer(name)
    return kind(
        image_processor=image_processor, tokenizer=tokenizer, chat_template=family.template, **family.processor[1]
    )


def _without_videos(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The class without its part for videos, which may need torchvision; known here by its name, for pickling."""
    parts = [part for part in kind.get_attributes() if part != "video_processor"]
    changes = {"get_attributes": classmethod(lambda cls: parts), "__module__": __name__}
    made: type[ProcessorMixin] = globals().setdefault(kind.__name__, type(kind.__name__, (kind,), changes))
    return made


def placeholder_id(name: str) -> int:
    """The id of a family's placeholders."""
    found: int = build_vision_tokenizer(name).convert_tokens_to_ids(FAMILIES[name].placeholder)
    return found


_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _chat(start: str, end: str, image: str, *, bos: str = "", assistant: str = "assistant") -> str:
    """A template of turns that are one like the other; `{role}` stands for the role."""
    role = f"(message.role if message.role != 'assistant' else '{assistant}')"
    opening = start.replace("{role}", "' + " + role + " + '")
    generation = start.replace("{role}", assistant)
    return (
        f"{{{{ '{bos}' }}}}"
        "{% for message in messages %}"
        f"{{{{ '{opening}' }}}}"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        f"{{% if part.type == 'image' %}}{{{{ '{image}' }}}}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
        "{% endfor %}{% endif %}"
        f"{{{{ '{end}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{generation}' }}}}{{% endif %}}"
    )


_QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_QWEN_CHAT = _chat("<|im_start|>{role}\\n", "<|im_end|>\\n", "<|vision_start|><|image_pad|><|vision_end|>")

FAMILIES: dict[str, VisionFamily] = {
    "qwen2_5_vl": VisionFamily(
        text={**_TEXT, "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
        vision={
            "hidden_size": 24,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        tokens=_QWEN_TOKENS,
        specials=("<|im_start|>", "<|im_end|>"),
        image_processor=("Qwen2VLImageProcessorPil", {"patch_size": 4, "min_pixels": 8 * 8, "max_pixels": 24 * 24}),
        processor=("Qwen2_5_VLProcessor", {}),
        template=_QWEN_CHAT,
        mark="<|vision_start|><|image_pad|><|vision_end|>",
        placeholder="<|image_pad|>",
        token_types=("mm_token_type_ids",),
    ),
    "gemma3": VisionFamily(
        text={**_TEXT, "num_hidden_layers": 3, "head_dim": 8, "sliding_window": 6, "sliding_window_pattern": 2},
        vision=_TOWER,
        config={"mm_tokens_per_image": 4},
        tokens={
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        specials=("<start_of_turn>", "<end_of_turn>"),
        image_processor=("Gemma3ImageProcessorPil", {"size": {"height": 32, "width": 32}}),
        processor=("Gemma3Processor", {"image_seq_length": 4}),
        template=_chat(
            "<start_of_turn>{role}\\n", "<end_of_turn>\\n", "<start_of_image>", bos="<s>", assistant="model"
        ),
        mark="<start_of_image>",
        placeholder="<image_soft_token>",
        token_types=("token_type_ids",),
    ),
    "llava": VisionFamily(
        text={**_TEXT, "model_type": "llama"},
        vision={**_TOWER, "model_type": "clip_vision_model", "num_hidden_layers": 3},
        config={"vision_feature_layer": -2, "image_seq_length": 16},
        tokens={"image_token_index": "<image>"},
        image_processor=(
            "LlavaImageProcessorPil",
            {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        ),
        processor=(
            "LlavaProcessor",
            {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        ),
        template=_chat("{role}: ", " ", "<image>\\n", bos="<s>"),
        mark="<image>",
        placeholder="<image>",
    ),
}

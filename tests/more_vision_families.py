"""More families of vision-language models in small; importing this adds them to `vision_families.FAMILIES`."""

from __future__ import annotations

from typing import Any

from vision_families import FAMILIES, VisionFamily

_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_QWEN = FAMILIES["qwen2_5_vl"]
_LLAVA = FAMILIES["llava"]
_QWEN_TOWER = {"depth": 2, "num_heads": 2, "hidden_size": 24, "intermediate_size": 32, "patch_size": 4}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_SQUARES = {"size": {"height": 32, "width": 32}}
_GRIDS = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
_TILES = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **_GRIDS}

MORE: dict[str, VisionFamily] = {
    "idefics3": VisionFamily(
        text={**_TEXT, "model_type": "llama"},
        vision=_TOWER,
        config={"scale_factor": 2},
        tokens={"image_token_id": "<image>"},
        specials=("<fake_token_around_image>", "<end_of_utterance>", "<global-img>"),
        image_processor=(
            "Idefics3ImageProcessorPil",
            {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
        ),
        processor=("Idefics3Processor", {"image_seq_len": 4}),
        template=_LLAVA.template,
        mark="<image>",
        placeholder="<image>",
    ),
    "llava_next": VisionFamily(
        text=_LLAVA.text,
        vision=_LLAVA.vision,
        config={"vision_feature_layer": -2, **_GRIDS},
        tokens={"image_token_index": "<image>"},
        image_processor=("LlavaNextImageProcessorPil", _TILES),
        processor=("LlavaNextProcessor", _LLAVA.processor[1]),
        template=_LLAVA.template,
        mark="<image>",
        placeholder="<image>",
    ),
    "paligemma": VisionFamily(
        text={**_TEXT, "model_type": "gemma", "head_dim": 8},
        vision={**_TOWER, "model_type": "siglip_vision_model"},
        config={"projection_dim": 32},
        tokens={"image_token_index": "<image>"},
        named={"image_token": "<image>"},
        image_processor=("SiglipImageProcessorPil", {**_SQUARES, "image_seq_length": 16}),
        processor=("PaliGemmaProcessor", {}),
        template="{{ '<image>' * (messages[0].content | selectattr('type', 'equalto', 'image') | list | length) }}"
        "{{ messages[0].content[-1].text }}",
        mark="<image>",
        placeholder="<image>",
        token_types=("token_type_ids",),
        response_type=1,
    ),
    "qwen2_vl": VisionFamily(
        text={**_TEXT, "rope_parameters": _MROPE},
        vision={"depth": 2, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        tokens=_QWEN.tokens,
        specials=_QWEN.specials,
        image_processor=_QWEN.image_processor,
        processor=("Qwen2VLProcessor", {}),
        template=_QWEN.template,
        mark=_QWEN.mark,
        placeholder=_QWEN.placeholder,
        token_types=_QWEN.token_types,
    ),
    "qwen3_vl": VisionFamily(
        text={**_TEXT, "head_dim": 8, "rope_parameters": _MROPE},
        vision={
            **_QWEN_TOWER,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        tokens=_QWEN.tokens,
        specials=_QWEN.specials,
        image_processor=_QWEN.image_processor,
        processor=("Qwen3VLProcessor", {}),
        template=_QWEN.template,
        mark=_QWEN.mark,
        placeholder=_QWEN.placeholder,
        token_types=_QWEN.token_types,
    ),
}
FAMILIES.update(MORE)

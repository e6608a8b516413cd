"""What the census needs to know about each vision-language family: its tower's inputs, and sizes; data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import census_image_inputs as kinds
from census_settings import MIXED_WINDOWS, SETTINGS, SIZES

IMAGE, VIDEO, START, END = 100, 101, 102, 103

IMAGE_SIZES: dict[str, Any] = {
    **SIZES,
    "patch_size": 8,
    "depth": 2,
    "embed_dim": 32,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "tokens_per_second": 2,
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "audio_token_id": VIDEO,
    "audio_token_index": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "boi_token_id": START,
    "boi_token_index": START,
    "eoi_token_id": END,
    "eoi_token_index": END,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
    "num_position_embeddings": 64,
    "mm_tokens_per_image": 4,
    "projection_dim": 32,
}


@dataclass(frozen=True, kw_only=True)
class ImageFamily:
    """How the census builds a family's images and prompts."""

    inputs: kinds.Maker = kinds.square
    """Makes one image's inputs."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    """Changes to its config."""

    token_types: str = ""
    """Token types that its forward takes: 1 for placeholders."""

    response_type: int = 0
    """Token type of a response."""

    join: int = 0
    """The dimension along which a sequence's images are joined."""

    placeholders: int | None = None
    """Placeholders per image; None for one per row of its features."""

    split: bool = False
    """Whether text stands between the placeholders of an image."""


def _mrope(*sections: int, **others: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [*sections]}
    return {"text_config": {"rope_parameters": {**rope, **others}}}


def _grid(*sections: int, vision: Mapping[str, Any] = MappingProxyType({}), **others: Any) -> ImageFamily:
    changes = {**_mrope(*sections, **others), "vision_config": vision}
    return ImageFamily(inputs=kinds.grid, token_types="mm_token_type_ids", changes=changes)


def _thinker(*sections: int, vision: Mapping[str, Any] = MappingProxyType({})) -> ImageFamily:
    changes = {
        **_mrope(*sections),
        "vision_config": vision,
        "vision_start_token_id": START,
        "audio_start_token_id": 104,
    }
    return ImageFamily(inputs=kinds.grid, changes=changes)


_WINDOW = {"vision_config": {"window_size": 32}}
_PIXTRAL = ImageFamily(inputs=kinds.whole, split=True, changes={"vision_config": {"head_dim": 8}})
_TILES = ImageFamily(inputs=kinds.tiles, split=True)
_SQUARE = ImageFamily(split=True)
_ANY = ImageFamily(inputs=kinds.any_resolution, changes={"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]})

IMAGE_FAMILIES: dict[str, ImageFamily] = {
    "blip-2": ImageFamily(changes={"num_query_tokens": 4, "image_token_index": IMAGE}),
    "chameleon": ImageFamily(
        changes={
            "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 8, "resolution": 32},
            "vocabulary_map": {"<image>": IMAGE, **{f"IMGIMG{letter}Z": 80 + i for i, letter in enumerate("ABCDEFGH")}},
        }
    ),
    "cohere_compass": ImageFamily(
        inputs=kinds.grid,
        token_types="mm_token_type_ids",
        changes={"text_config": SETTINGS["cohere_compass_text"]},
    ),
    "cosmos3_edge": ImageFamily(inputs=kinds.flat_grid, token_types="mm_token_type_ids", changes=_mrope(4, 2, 2)),
    "cosmos3_omni": _grid(4, 2, 2),
    "emu3": ImageFamily(
        inputs=kinds.whole,
        changes={
            "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 64, "hidden_size": 32},
            "vocabulary_map": {
                "<image>": IMAGE,
                "<|extra_200|>": 90,
                **{f"<|visual token {i:06}|>": 10 + i for i in range(64)},
            },
        },
    ),
    "ernie4_5_vl_moe": ImageFamily(
        inputs=kinds.flat_grid,
        token_types="mm_token_type_ids",
        changes={"text_config": {**_mrope(1, 1, 2)["text_config"], "moe_intermediate_size": [24, 24]}},
    ),
    "granite4_vision": ImageFamily(
        inputs=kinds.any_resolution,
        changes={
            "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
            "vision_config": {"hidden_size": 64},
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[0, 0], [-1, 1]],
            "spatial_target_layers": [0, 1, 0, 1],
        },
    ),
    "instructblip": ImageFamily(
        inputs=kinds.square_and_instruction, changes={"num_query_tokens": 4, "image_token_index": IMAGE}
    ),
    "ovis2": _TILES,
    "pp_chart2table": _SQUARE,
    "qwen2_5_omni_thinker": _thinker(2, 1, 1, vision=_WINDOW["vision_config"]),
    "qwen3_omni_moe_thinker": _thinker(4, 2, 2),
    "aria": ImageFamily(inputs=kinds.masked_pixels, changes={"projector_patch_to_query_dict": {16: 4}}),
    "aya_vision": _TILES,
    "cohere2_vision": _TILES,
    "deepseek_vl": _SQUARE,
    "deepseek_vl_hybrid": ImageFamily(
        inputs=kinds.two_resolutions, changes={"high_res_vision_config": {"image_size": 64, "global_attn_indexes": [1]}}
    ),
    "exaone4_5": ImageFamily(inputs=kinds.grid, changes=_WINDOW),
    "fuyu": ImageFamily(inputs=kinds.fuyu_patches, join=1),
    # More tokens in an image than in a window.
    "gemma3": ImageFamily(
        token_types="token_type_ids", changes={"text_config": MIXED_WINDOWS, "mm_tokens_per_image": 16}
    ),
    "gemma4": ImageFamily(inputs=kinds.placed_patches, token_types="mm_token_type_ids"),
    "gemma4:both_ways": ImageFamily(
        inputs=kinds.placed_patches,
        token_types="mm_token_type_ids",
        changes={"text_config": {"use_bidirectional_attention": "vision"}},
    ),
    "gemma4_unified": ImageFamily(
        inputs=kinds.merged_patches,
        token_types="mm_token_type_ids",
        changes={"vision_config": {"patch_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 64, "output_proj_dims": 32}},
    ),
    "glm46v": _grid(2, 1, 1),
    "glm4v": _grid(2, 1, 1),
    "glm4v_moe": _grid(2, 1, 1),
    "glm_ocr": _grid(2, 1, 1),
    "glmga": _grid(2, 1, 1),
    "got_ocr2": _SQUARE,
    "granite_docling": ImageFamily(inputs=kinds.chosen_tiles, changes={"vision_config": {"scale_factor": 2}}),
    "hunyuan_vl": _grid(2, 2, 2, 2),
    "hyperclovax_vision_v2": ImageFamily(inputs=kinds.grid, changes=_WINDOW),
    "idefics2": ImageFamily(inputs=kinds.masked_tiles, join=1, split=True),
    "idefics3": ImageFamily(inputs=kinds.masked_tiles, join=1, split=True),
    "internvl": _TILES,
    "janus": ImageFamily(
        split=True,
        changes={
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "latent_channels": 32,
                "num_embeddings": 16,
                "num_res_blocks": 1,
                "image_token_embed_dim": 32,
            }
        },
    ),
    "kimi_k25": ImageFamily(inputs=kinds.grid_of_patches, changes={"projection_hidden_size": 32}),
    "lfm2_vl": ImageFamily(inputs=kinds.shaped_patches, split=True),
    "lfm3_vl": ImageFamily(inputs=kinds.grid),
    "lighton_ocr": _PIXTRAL,
    "llama4": ImageFamily(
        inputs=kinds.tiles,
        split=True,
        changes={
            **SETTINGS["llama4"],
            "vision_config": {
                "intermediate_size": 128,
                "projector_input_dim": 40,
                "projector_output_dim": 40,
                "vision_output_dim": 40,
            },
        },
    ),
    "llava": _SQUARE,
    "llava:pixtral": ImageFamily(
        inputs=kinds.whole,
        split=True,
        changes={
            "vision_config": {"model_type": "pixtral", "head_dim": 8},
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": -1,
        },
    ),
    "llava_next": _ANY,
    "llava_next_video": _ANY,
    "llava_onevision": _ANY,
    "minicpm_ocr": ImageFamily(inputs=kinds.strips, join=3, changes={"insert_layer_id": 0}),
    "minicpmv4_6": ImageFamily(inputs=kinds.strips, join=3, changes={"insert_layer_id": 0}),
    "minicpmv4_7": ImageFamily(
        inputs=kinds.strips,
        join=3,
        token_types="mm_token_type_ids",
        changes={"insert_layer_id": 0},
    ),
    "minimax_m3_vl": ImageFamily(inputs=kinds.grid),
    "mistral3": _PIXTRAL,
    "mistral_large4": _PIXTRAL,
    "mllama": ImageFamily(
        inputs=kinds.aspect_tiles,
        join=1,
        placeholders=1,
        changes={
            "text_config": {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
            "vision_config": {
                "num_global_layers": 1,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 64,
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
                "max_num_tiles": 2,
            },
        },
    ),
    "muse_glimmer": ImageFamily(inputs=kinds.grid, changes={"out_hidden_size": 128, "projector_hidden_size": 40}),
    "paddleocr_vl": ImageFamily(inputs=kinds.grid_of_patches, token_types="mm_token_type_ids", changes=_mrope(4, 2, 2)),
    "paligemma": ImageFamily(token_types="token_type_ids", response_type=1),
    "qianfan_ocr": _TILES,
    "qwen2_5_vl": _grid(2, 1, 1, vision=_WINDOW["vision_config"]),
    "qwen2_vl": _grid(2, 1, 1),
    "qwen3_5": _grid(4, 2, 2),
    "qwen3_5_moe": _grid(4, 2, 2),
    "qwen3_vl": _grid(4, 2, 2),
    "qwen3_vl_moe": _grid(4, 2, 2),
    "qwen4_exp": _grid(4, 2, 2),
    "shieldgemma2": ImageFamily(token_types="token_type_ids"),
    "smolvlm": ImageFamily(inputs=kinds.masked_tiles, join=1, split=True),
    "step3p7": ImageFamily(inputs=kinds.local_and_whole),
    "video_llama_3": ImageFamily(inputs=kinds.grid_with_merges),
    "video_llava": _SQUARE,
    "vipllava": ImageFamily(split=True, changes={"vision_feature_layers": [-2, 1]}),
}

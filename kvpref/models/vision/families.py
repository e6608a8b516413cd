"""The model families that are exact with images, what each needs, and why others take only text.

`benchmarks/census.py --task image` finds them on tiny models, in every mode, against each sequence alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class VisionFamily:
    """What cannot be read from a family's models."""

    join: int = 0
    """The dimension along which its processor concatenates the pixels of several images."""

    join_of_row: int | None = None
    """The same for images of one row of text; None if it is `join`."""

    projector: str = ""
    """The part of the model that its `get_image_features` leaves out."""

    cross_attention: bool = False
    """Whether layers cross-attend to images, with one placeholder for each in the text; see `cross_attention`."""

    casts_pixels: bool = False
    """Whether pixels must be cast to the dtype of its weights because its own code does not."""


_PLAIN = VisionFamily()
_IN_ONE_ROW = VisionFamily(join_of_row=1)
_IN_ONE_STRIP = VisionFamily(join=3)

VISION: dict[str, VisionFamily] = {
    "aria": VisionFamily(casts_pixels=True),
    "aya_vision": _PLAIN,
    "chameleon": VisionFamily(casts_pixels=True),
    "cohere2_vision": _PLAIN,
    "cohere_compass": _PLAIN,
    "cosmos3_edge": _PLAIN,
    "cosmos3_omni": _PLAIN,
    "deepseek_vl": _PLAIN,
    "deepseek_vl_hybrid": VisionFamily(casts_pixels=True),
    "exaone4_5": _PLAIN,
    "fuyu": VisionFamily(casts_pixels=True),
    "gemma3": _PLAIN,
    "gemma4": _PLAIN,
    "gemma4_unified": _PLAIN,
    "glm46v": _PLAIN,
    "glm4v": _PLAIN,
    "glm4v_moe": _PLAIN,
    "glm_ocr": _PLAIN,
    "glmga": _PLAIN,
    "got_ocr2": VisionFamily(casts_pixels=True),
    "granite_docling": _PLAIN,
    "hunyuan_vl": _PLAIN,
    "hyperclovax_vision_v2": _PLAIN,
    "idefics2": _IN_ONE_ROW,
    "idefics3": _IN_ONE_ROW,
    "internvl": _PLAIN,
    "janus": _PLAIN,
    "kimi_k25": _PLAIN,
    "lfm2_vl": _PLAIN,
    "lfm3_vl": VisionFamily(casts_pixels=True),
    "lighton_ocr": _PLAIN,
    "llama4": VisionFamily(projector="multi_modal_projector", casts_pixels=True),
    "llava": _PLAIN,
    "llava_next": _PLAIN,
    "llava_next_video": _PLAIN,
    "llava_onevision": _PLAIN,
    "minicpm_ocr": _IN_ONE_STRIP,
    "minicpmv4_6": _IN_ONE_STRIP,
    "minicpmv4_7": _IN_ONE_STRIP,
    "mistral3": _PLAIN,
    "mllama": VisionFamily(join_of_row=1, cross_attention=True),
    "muse_glimmer": _PLAIN,
    "paddleocr_vl": _PLAIN,
    "paligemma": _PLAIN,
    "pp_chart2table": VisionFamily(casts_pixels=True),
    "qianfan_ocr": _PLAIN,
    "qwen2_5_vl": _PLAIN,
    "qwen2_vl": _PLAIN,
    "qwen3_5": _PLAIN,
    "qwen3_5_moe": _PLAIN,
    "qwen3_vl": _PLAIN,
    "qwen3_vl_moe": _PLAIN,
    "shieldgemma2": _PLAIN,
    "smolvlm": _IN_ONE_ROW,
    "step3p7": _PLAIN,
    "video_llama_3": _PLAIN,
    "video_llava": _PLAIN,
    "vipllava": _PLAIN,
}

_TIMM = "its tower is of the package timm, and nobody has checked it"

WITHOUT_IMAGES: dict[str, str] = {
    "emu3": "its tower normalises over all images of a batch while it trains",
    "ernie4_5_vl_moe": "it routes tokens of images to experts of their own",
    "gemma3n": _TIMM,
    "ovis2": "its tower makes the embeddings of the tokens around an image too",
}
"""Why families that are exact on text take no images here; completes "it ..."."""


TEXT_PARTS = frozenset(
    {
        "chameleon",
        "cosmos3_edge_text",
        "ernie4_5_vl_moe_text",
        "glm4v_moe_text",
        "glm4v_text",
        "glm_ocr_text",
        "granite_docling_text",
        "hunyuan_vl_text",
        "mllama_text_model",
        "muse_glimmer_text",
        "paddleocr_vl_text",
        "qwen2_5_vl_text",
        "qwen2_vl_text",
        "qwen3_vl_moe_text",
        "qwen3_vl_text",
        "step3p5",
    }
)
"""Language models of these families that are not families of their own."""


def is_known(name: str) -> bool:
    """Whether a model type, or that of its language model, belongs to these families, which are all exact on text."""
    return name in VISION or name in WITHOUT_IMAGES or name in TEXT_PARTS


def family_of(model: PreTrainedModel) -> VisionFamily:
    """What a model's family needs; the defaults for a family that nobody has checked."""
    return VISION.get(model.config.model_type, _PLAIN)

"""The model families that are known to be exact, and why others are refused.

Both lists come from `benchmarks/census.py`, which compares tiny models in every mode with each sequence alone. Families
that occur only with images are in `kvpref.models.vision.families`. To add a family: a row in `FAMILIES`, what its tiny
config needs in `benchmarks/census_settings.py`, and a run of the census.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Family:
    """What cannot be read from a family's models."""

    note: str = ""
    """What a user should know."""

    embedding_factor: str = ""
    """Name in the config of a factor that the model applies only to embeddings it looks up itself."""


class Refusal(NamedTuple):
    """Why a family is not supported."""

    reason: str
    """Completes a sentence about the model: "it ..."."""

    nearest: str
    """The nearest supported family."""

    padded: bool = False
    """Whether it is exact in mode ``padded``, which runs the model's own attention."""


_TEXT_ONLY = Family(note="given text only")
_AND_IMAGES = Family(note="given text, and images; see below")
_OF_ENCODER_DECODER = Family(note="its decoder alone, without the encoder")
_DECODER = Family(note="as a decoder: `is_decoder=True` in its config")

FAMILIES: dict[str, Family] = {
    "afmoe": Family(),
    "apertus": Family(),
    "arcee": Family(),
    "aria_text": Family(),
    "axk1": Family(),
    "bailing_hybrid": Family(),
    "bamba": Family(),
    "bart": _OF_ENCODER_DECODER,
    "beam": Family(),
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "biogpt": Family(),
    "bitnet": Family(),
    "blenderbot": _OF_ENCODER_DECODER,
    "blenderbot-small": _OF_ENCODER_DECODER,
    "camembert": _DECODER,
    "cohere": Family(),
    "cohere2": Family(),
    "cohere2_moe": Family(),
    "cohere_compass_text": Family(),
    "cwm": Family(),
    "data2vec-text": _DECODER,
    "dbrx": Family(),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(),
    "diffllama": Family(),
    "dots1": Family(),
    "electra": _DECODER,
    "emu3": _TEXT_ONLY,
    "emu3_text_model": Family(),
    "ernie": _DECODER,
    "ernie4_5": Family(),
    "ernie4_5_moe": Family(),
    "exaone4": Family(),
    "exaone_moe": Family(),
    "falcon_h1": Family(embedding_factor="embedding_multiplier"),
    "falcon_mamba": Family(),
    "flex_olmo": Family(),
    "flint": Family(),
    "fuyu": _AND_IMAGES,
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3": _AND_IMAGES,
    "gemma3_text": Family(),
    "gemma3n": _TEXT_ONLY,
    "gemma3n_text": Family(),
    "gemma4": _AND_IMAGES,
    "gemma4_text": Family(),
    "gemma4_unified": _AND_IMAGES,
    "gemma4_unified_text": Family(),
    "glm": Family(),
    "glm4": Family(),
    "glm4_moe": Family(),
    "glm4_moe_lite": Family(),
    "got_ocr2": _AND_IMAGES,
    "gpt-sw3": Family(),
    "gpt2": Family(),
    "gpt_bigcode": Family(),
    "gpt_neox": Family(),
    "gpt_oss": Family(),
    "granite": Family(),
    "granite_swa": Family(),
    "granitemoe": Family(),
    "granitemoe_swa": Family(),
    "granitemoehybrid": Family(),
    "granitemoeshared": Family(),
    "helium": Family(),
    "hrm_text": Family(),
    "hunyuan_v1_dense": Family(),
    "hunyuan_v1_moe": Family(),
    "hy_v3": Family(),
    "hyperclovax": Family(),
    "internlm3": Family(),
    "iquestcoder": Family(),
    "jais2": Family(),
    "jamba": Family(),
    "jetmoe": Family(),
    "kimi_linear": Family(),
    "kolibri1": Family(),
    "laguna": Family(),
    "lfm2": Family(),
    "lfm2_moe": Family(),
    "lfm3": Family(),
    "llama": Family(),
    "llama4": _AND_IMAGES,
    "llama4_text": Family(),
    "longcat_flash": Family(),
    "mamba": Family(),
    "mamba2": Family(),
    "marian": _OF_ENCODER_DECODER,
    "mbart": _OF_ENCODER_DECODER,
    "mellum": Family(),
    "mimo_v2_flash": Family(),
    "minicpm3": Family(),
    "minimax": Family(),
    "minimax_m2": Family(),
    "ministral": Family(),
    "ministral3": Family(),
    "mistral": Family(),
    "mistral3": _AND_IMAGES,
    "mixtral": Family(),
    "mllama": _AND_IMAGES,
    "modernbert-decoder": Family(),
    "moshi": _TEXT_ONLY,
    "moss_transcribe_diarize": _TEXT_ONLY,
    "nanochat": Family(),
    "nemotron": Family(),
    "nemotron_h": Family(),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(),
    "olmo_hybrid": Family(),
    "olmoe": Family(),
    "opt": Family(),
    "pegasus": _OF_ENCODER_DECODER,
    "persimmon": Family(),
    "phi": Family(),
    "phi3": Family(),
    "phi4_multimodal": _TEXT_ONLY,
    "phimoe": Family(note="in evaluation mode: in training its router draws experts at random"),
    "plbart": _OF_ENCODER_DECODER,
    "qwen2": Family(),
    "qwen2_moe": Family(),
    "qwen3": Family(),
    "qwen3_5": _AND_IMAGES,
    "qwen3_5_moe": _AND_IMAGES,
    "qwen3_5_moe_text": Family(),
    "qwen3_5_text": Family(),
    "qwen3_moe": Family(),
    "qwen3_next": Family(),
    "roberta": _DECODER,
    "roberta-prelayernorm": _DECODER,
    "roc_bert": _DECODER,
    "seed_oss": Family(),
    "smollm3": Family(),
    "solar_open": Family(),
    "stablelm": Family(),
    "starcoder2": Family(),
    "vaultgemma": Family(),
    "whisper": _OF_ENCODER_DECODER,
    "xlm-roberta": _DECODER,
    "xlm-roberta-xl": _DECODER,
    "xmod": _DECODER,
    "youtu": Family(),
    "zamba": Family(),
    "zamba2": Family(),
}

_OWN_ATTENTION = "it does not route attention through transformers' attention interface"
_RELATIVE = "it adds biases of relative positions and convolutions to its attention"
_SPARSE = "its sparse attention picks keys by scores over the whole row"
_RECURRENT = "its recurrent layers take no state to begin with"
_OTHER_HIDDEN_STATES = "it drafts for another model, whose hidden states it reads"
_SEVERAL_TOKENS = "it predicts several tokens of sound at each position"

_ENCODER = "its prompts go through an encoder"
_ALWAYS_AN_IMAGE = "its forward takes no prompt without an image"
_BESIDE = "its layers attend to an image beside the text"
_POSITIONS = "its positions of images differ between releases of transformers"
_UNCHECKED = "nobody has checked it on a small model"

REFUSED: dict[str, Refusal] = {
    "axk2": Refusal(_SPARSE, "axk1"),
    "big_bird": Refusal(_OWN_ATTENTION, "bert"),
    "bigbird_pegasus": Refusal(_OWN_ATTENTION, "opt"),
    "blip": Refusal(_BESIDE, "llava"),
    "blip-2": Refusal(_ALWAYS_AN_IMAGE, "llava"),
    "bloom": Refusal(_OWN_ATTENTION, "gpt_neox", padded=True),
    "blt": Refusal("it groups bytes into patches, which depend on the bytes behind them", "llama"),
    "codegen": Refusal(_OWN_ATTENTION, "gpt_neox", padded=True),
    "cpmant": Refusal(_OWN_ATTENTION, "llama"),
    "ctrl": Refusal(_OWN_ATTENTION, "gpt2", padded=True),
    "deepseek_ocr2": Refusal(_UNCHECKED, "deepseek_vl"),
    "deepseek_v32": Refusal(_SPARSE, "deepseek_v3"),
    "deepseek_v4": Refusal("it compresses keys and values of runs of tokens along the row", "deepseek_v3"),
    "diffusion_gemma": Refusal("it fills in blocks of tokens in many steps, and not one after another", "gemma4"),
    "doge": Refusal("its mask depends on the values of the whole row", "llama"),
    "dots3_note": Refusal(_SPARSE, "dots1"),
    "dots3_note_text": Refusal(_SPARSE, "dots1"),
    "evolla": Refusal("its layers attend to a protein beside the text", "llama"),
    "falcon": Refusal(_OWN_ATTENTION, "llama", padded=True),
    "fast_vlm": Refusal("its tower is of the package timm, and nobody has checked it", "llava"),
    "florence2": Refusal(_ENCODER, "paligemma"),
    "gemma4_assistant": Refusal(_OTHER_HIDDEN_STATES, "gemma4_text"),
    "gemma4_unified_assistant": Refusal(_OTHER_HIDDEN_STATES, "gemma4_unified_text"),
    "git": Refusal("it puts an image before the text and builds its masks itself", "bert"),
    "glm5_next": Refusal(_SPARSE, "glm4v"),
    "glm_moe_dsa": Refusal(_SPARSE, "glm4_moe"),
    "gpt_neo": Refusal(_OWN_ATTENTION, "gpt2", padded=True),
    "gpt_neox_japanese": Refusal(_OWN_ATTENTION, "gpt_neox", padded=True),
    "gptj": Refusal(_OWN_ATTENTION, "gpt_neox", padded=True),
    "granite4_vision": Refusal("it adds features of images to layers by number", "llava_next"),
    "hy_v4": Refusal(_SPARSE, "hy_v3"),
    "idefics": Refusal(_BESIDE, "idefics2"),
    "inkling2": Refusal(_RELATIVE, "qwen3_vl"),
    "inkling2_text": Refusal(
        "it adds biases of relative positions and convolutions to its attention", "qwen3_moe", padded=True
    ),
    "inkling_mm_model": Refusal(_RELATIVE, "qwen3_vl"),
    "inkling_text": Refusal(
        "it adds biases of relative positions and convolutions to its attention", "qwen3_moe", padded=True
    ),
    "instructblip": Refusal(_ALWAYS_AN_IMAGE, "llava"),
    "instructblipvideo": Refusal(_ALWAYS_AN_IMAGE, "llava"),
    "kosmos-2": Refusal("it is told by a mask where images stand, and has no placeholders", "llava"),
    "kosmos-2.5": Refusal("it is told by a mask where images stand, and has no placeholders", "llava"),
    "megatron-bert": Refusal(_OWN_ATTENTION, "bert", padded=True),
    "minimax_m3_vl": Refusal(_SPARSE, "qwen3_vl"),
    "minimax_m3_vl_text": Refusal(_SPARSE, "minimax_m2"),
    "mistral4": Refusal("transformers lists it among models that read images, and its class reads none", "mistral3"),
    "mistral_large4": Refusal(_SPARSE, "mistral3"),
    "molmo2": Refusal(_UNCHECKED, "qwen2_vl"),
    "mpt": Refusal(_OWN_ATTENTION, "llama", padded=True),
    "muse_spark": Refusal(_UNCHECKED, "muse_glimmer"),
    "musicgen": Refusal(_SEVERAL_TOKENS, "opt"),
    "musicgen_melody": Refusal(_SEVERAL_TOKENS, "opt"),
    "mvp": Refusal(_OWN_ATTENTION, "opt", padded=True),
    "nemotron_h_omni": Refusal(_UNCHECKED, "internvl"),
    "openai-gpt": Refusal(_OWN_ATTENTION, "gpt2", padded=True),
    "perception_lm": Refusal("its tower is of the package timm, and nobody has checked it", "llava"),
    "pi0": Refusal("it predicts actions, and not tokens", "paligemma"),
    "pix2struct": Refusal(_ENCODER, "idefics3"),
    "pp_formulanet": Refusal(_ENCODER, "got_ocr2"),
    "prophetnet": Refusal("it predicts several tokens ahead with attention of its own", "opt"),
    "qwen2_5_omni_thinker": Refusal(_POSITIONS, "qwen2_5_vl"),
    "qwen3_omni_moe_thinker": Refusal(_POSITIONS, "qwen3_vl_moe"),
    "qwen4_exp": Refusal(_SPARSE, "qwen3_next"),
    "qwen4_exp_text": Refusal(_SPARSE, "qwen3_next"),
    "recurrent_gemma": Refusal(_RECURRENT, "gemma2"),
    "reformer": Refusal("its attention looks for similar tokens by hashing along the whole row", "gpt2"),
    "rembert": Refusal(_OWN_ATTENTION, "bert"),
    "roformer": Refusal(_OWN_ATTENTION, "bert", padded=True),
    "rwkv": Refusal(_RECURRENT, "mamba2", padded=True),
    "t5gemma2": Refusal(_ENCODER, "gemma3"),
    "trocr": Refusal(_OWN_ATTENTION, "opt", padded=True),
    "udop": Refusal(_ENCODER, "paligemma"),
    "unlimited_ocr": Refusal(_UNCHECKED, "deepseek_vl"),
    "vision-encoder-decoder": Refusal(_ENCODER, "paligemma"),
    "xglm": Refusal(_OWN_ATTENTION, "opt", padded=True),
    "xlm": Refusal(_OWN_ATTENTION, "bert", padded=True),
    "xlnet": Refusal(_OWN_ATTENTION, "gpt2", padded=True),
    "xlstm": Refusal(_RECURRENT, "mamba2", padded=True),
    "zaya": Refusal("its convolutions mix keys and values along the row", "qwen3_moe", padded=True),
}

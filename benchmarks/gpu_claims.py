"""What docs/gpu.md claims, and which rows of the GPU run would show it; standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of the page."""

    text: str
    """What should hold on a GPU."""

    stage: str
    """The stage whose rows show it."""

    rows: tuple[str, ...] = ("",)
    """Beginnings of those rows' names."""

    stand_in: str | None
    """The test that shows as much as possible without a GPU; None if there is none."""


KERNELS = "attention of backend `{}`, output and every gradient, no worse than twice naive 16-bit attention"
OPTIONAL = "tests/ops/attention/test_optional_backends.py"
CLAIMS = (
    Claim(
        text=KERNELS.format("cuda_flash"),
        stage="kernels",
        rows=("cuda_flash ",),
        stand_in="tests/ops/attention/test_backends.py",
    ),
    Claim(text=KERNELS.format("efficient"), stage="kernels", rows=("efficient ",), stand_in=OPTIONAL),
    Claim(text=KERNELS.format("flash_attn"), stage="kernels", rows=("flash_attn ",), stand_in=OPTIONAL),
    Claim(text=KERNELS.format("flash_attn_3"), stage="kernels", rows=("flash_attn_3 ",), stand_in=OPTIONAL),
    Claim(text=KERNELS.format("flash_attn_4"), stage="kernels", rows=("flash_attn_4 ",), stand_in=OPTIONAL),
    Claim(text=KERNELS.format("xformers"), stage="kernels", rows=("xformers ",), stand_in=OPTIONAL),
    Claim(text="no kernel reads or writes outside its tensors (compute-sanitizer)", stage="memcheck", stand_in=None),
    Claim(
        text="calls with more rows than FlashAttention-2's 32-bit offsets reach are right and harm nothing",
        stage="far_rows",
        stand_in="tests/ops/attention/test_splitting.py",
    ),
    Claim(
        text="a model of real width in bf16, modes and schedules, no worse than twice a naive run",
        stage="engine",
        rows=("llama", "phi3", "gpt_neox", "qwen3"),
        stand_in="tests/engine/test_exactness.py",
    ),
    Claim(
        text="entropies, hidden states, values, logits and rewards of such a model, likewise",
        stage="engine",
        rows=("head outputs", "rewards"),
        stand_in="tests/models/test_head_outputs.py",
    ),
    Claim(text="the tests in `tests/gpu`", stage="tests", stand_in=None),
    Claim(
        text="a training step of dpo, kto, grpo and bradley_terry never waits for the device",
        stage="steps",
        stand_in="tests/training/test_step_without_waiting.py",
    ),
    Claim(
        text='`prefix_cache="cpu"` frees the memory of the prefixes\' keys and values',
        stage="prefix_cache",
        stand_in="tests/state/test_host_cache.py",
    ),
    Claim(
        text="rate of attention beside plain matrix products",
        stage="rates",
        stand_in=None,
    ),
    Claim(
        text="length of a prompt below which copies of its keys and values pay (`spread_keys_below`)",
        stage="short_prefix",
        stand_in="tests/ops/attention/test_spreading.py",
    ),
    Claim(
        text="speed-up of whole models over mode `packed`, efficiency 0.95 (two responses) and 0.90 (32 responses)",
        stage="speed_ups",
        rows=("model",),
        stand_in=None,
    ),
    Claim(
        text="speed-up of attention alone with 28 responses, efficiency 0.85",
        stage="speed_ups",
        rows=("attention",),
        stand_in=None,
    ),
    Claim(
        text="keys and values of prefixes are held once",
        stage="speed_ups",
        rows=("bytes of prefixes",),
        stand_in="tests/state/test_cache.py",
    ),
    Claim(
        text="the peak in schedule `bounded` does not follow the number of responses",
        stage="speed_ups",
        rows=("bounded",),
        stand_in="tests/profiling/memory/test_bounded.py",
    ),
    Claim(
        text="the output of FlexAttention over one row per batch, and its time beside it",
        stage="peers",
        rows=("flex_attention",),
        stand_in=None,
    ),
    Claim(text="time beside that of TRL's trainer", stage="peers", rows=("trl",), stand_in=None),
    Claim(
        text="compiled layers give the gradients of plain ones",
        stage="compiled",
        stand_in="tests/models/test_compilation.py",
    ),
)

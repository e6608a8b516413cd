"""How many passes a rank runs in a step, given the largest micro-batch that fits."""

from __future__ import annotations

from kvpref.engine.options import EngineOptions
from kvpref.profiling.prediction.fit import VariantPlan, num_tokens
from kvpref.profiling.prediction.ranks import StepPasses
from kvpref.profiling.prediction.step import GroupShape


def step_passes(plan: VariantPlan, shape: GroupShape, groups_per_rank: int) -> StepPasses:
    """The passes of a step of `groups_per_rank` groups, in the largest micro-batches that fit.

    Args:
        plan: A plan that fits.
        shape: The shape of each group.
        groups_per_rank: Groups of a rank, or of ranks that share each micro-batch.
    """
    micro_batches = -(-groups_per_rank // plan.num_groups)
    if plan.variant.schedule == "bounded":
        forward, kept = _chunks(shape, plan.variant)
    else:
        forward = kept = 2 if plan.variant.mode == "two_pass" else 1
    return StepPasses(
        micro_batches=micro_batches,
        forward=micro_batches * forward,
        backward=micro_batches * forward,
        kept=micro_batches * kept,
        tokens=groups_per_rank * num_tokens(plan.variant.mode, shape),
    )


def _chunks(shape: GroupShape, variant: EngineOptions) -> tuple[int, int]:
    """Chunks of one group, and how many of the last together fit one chunk's bound, so that their graphs stay."""
    most = variant.max_tokens_per_chunk
    assert most is not None
    whole, rest = divmod(shape.prompt_tokens, most)
    chunks = [most] * whole + ([rest] if rest else [])
    # Responses are cut only if one exceeds a chunk.
    together = most // shape.response_tokens
    if together:
        whole, rest = divmod(shape.num_responses, together)
        chunks += [together * shape.response_tokens] * whole + ([rest * shape.response_tokens] if rest else [])
    else:
        whole, rest = divmod(shape.num_responses * shape.response_tokens, most)
        chunks += [most] * whole + ([rest] if rest else [])
    kept = held = 0
    for tokens in reversed(chunks):
        held += tokens
        if held > most:
            break
        kept += 1
    return len(chunks), kept

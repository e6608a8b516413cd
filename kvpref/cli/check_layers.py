"""What `kvpref check` finds in a model's layers, from passes on tensors without data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from kvpref.models.record import AttentionCall, Record

_MOST_POSITIONS = 2**17
_RESPONSES = (8, 5)


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What a group of identical layers does."""

    attention: tuple[str, ...]
    """For each attention call, its module's class, heads and head dims."""

    rule: tuple[str, ...]
    """For each attention call, which tokens a token sees."""

    sinks: bool
    """Whether every row has an extra logit."""

    softcap: float | None
    """The bound on attention scores; None for none."""

    state: tuple[str, ...]
    """Recurrent and convolution layers, whose state is carried between passes."""

    experts: str | None
    """The number of experts, and how many a token is routed to; None without experts."""


def find_layers(config: Any) -> dict[str, Any]:
    """Run passes over a short group and describe what the layers did.

    Args:
        config: The configuration of a supported family.

    Returns:
        ``layers``: a dict per kind of layer, with indices under ``layers``; ``head``: what computes the logits.
    """
    import torch

    import kvpref
    from kvpref.engine.reads import reads_of
    from kvpref.models.record import recorded
    from kvpref.models.support import unwrap
    from kvpref.profiling.prediction.model import TrainingSetup, build_fake_training

    fake = build_fake_training(config, TrainingSetup())
    model = unwrap(fake.model)
    prompt = [1] * _prompt_tokens(config.get_text_config(decoder=True))
    group = kvpref.Group(
        [kvpref.Sequence.from_prompt_and_response(prompt, [2 + i] * n) for i, n in enumerate(_RESPONSES)]
    )
    batch = kvpref.collate([group], reads=reads_of(model, "tokens"))
    batch.plan("two_pass")  # made of real tensors, which the engine reads
    with fake.mode, torch.no_grad(), recorded() as record:
        kvpref.response_logps(model, batch)
    return {"layers": list(_rows(model, record)), "head": _head(model)}


def _prompt_tokens(config: Any) -> int:
    """A prompt length above every window and chunk in the configuration, so that they show."""
    sizes = [
        value
        for name, value in vars(config).items()
        if re.search("sliding|window|attention_chunk", name) and isinstance(value, int) and value <= _MOST_POSITIONS
    ]
    return max([24, *(size + 8 for size in sizes)])


def _rows(model: PreTrainedModel, record: Record) -> Iterator[dict[str, Any]]:
    groups: dict[LayerFacts, list[int]] = {}
    for index, layer in enumerate(_stack(model, record)):
        inside = {id(module) for module in layer.modules()}
        calls = list(
            {(id(call.module), call.rule): call for call in record.calls if id(call.module) in inside}.values()
        )
        groups.setdefault(_facts(model, layer, calls, record), []).append(index)
    for facts, numbers in groups.items():
        yield {"layers": _ranges(numbers), **asdict(facts)}


def _stack(model: PreTrainedModel, record: Record) -> list[nn.Module]:
    """The list of layers that contains all modules that mixed tokens."""
    from torch import nn

    mixing = {id(module) for module in record.modules}
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and mixing <= {id(module) for module in stack.modules()}:
            return list(stack)
    return [model]


def _facts(model: PreTrainedModel, layer: nn.Module, calls: list[AttentionCall], record: Record) -> LayerFacts:
    from kvpref.models.mixers.kinds import KINDS

    inside = {id(module) for module in layer.modules()} - {id(call.module) for call in calls}
    mixers = [module for module in record.modules if id(module) in inside]
    softcaps = [call.params.softcap for call in calls if call.params.softcap is not None]
    return LayerFacts(
        attention=tuple(map(_attention, calls)),
        rule=tuple(str(call.rule) for call in calls),
        sinks=any(call.has_sink for call in calls),
        softcap=softcaps[0] if softcaps else None,
        state=tuple(KINDS[type(module).__name__].name for module in mixers),
        experts=_experts(model.config.get_text_config(decoder=True), layer),
    )


def _attention(call: AttentionCall) -> str:
    dims = str(call.head_dim) if call.value_dim == call.head_dim else f"{call.head_dim}/{call.value_dim}"
    return f"{type(call.module).__name__}, {call.num_heads} heads on {call.num_kv_heads}, dim {dims}"


def _experts(config: Any, layer: nn.Module) -> str | None:
    for module in layer.modules():
        count = getattr(module, "num_experts", None)
        if isinstance(count, int) and type(module).__name__.endswith("Experts"):
            chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None)
            return f"{count}, {chosen} per token" if chosen else str(count)
    return None


def _head(model: PreTrainedModel) -> str:
    from kvpref.models.head_form import head_form

    form = head_form(model)
    if not form.fused:
        return "the model's own forward, on the rows that predict"
    parts = ["linear"]
    if form.logit_scale != 1.0:
        parts.append(f"times {form.logit_scale:g}")
    if form.softcap is not None:
        parts.append(f"softcapped at {form.softcap:g}")
    return ", ".join(parts)


def _ranges(numbers: list[int]) -> str:
    """``0-2, 5`` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

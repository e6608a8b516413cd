"""kvpref: preference training that encodes each shared prompt once.

Names are imported on first use, so that `import kvpref` and `kvpref --help` stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpref.engine.attaching import attach
    from kvpref.engine.options import EngineOptions
    from kvpref.engine.passes import encode_prefix, response_logps, response_rewards, score_responses
    from kvpref.engine.schedules import forward_backward, forward_backward_step
    from kvpref.errors import InputError, RunError, UnsupportedModelError
    from kvpref.integrations.agent_loops import TreeLogps, tree_forward_backward, tree_logps
    from kvpref.integrations.shared_prefix import shared_prefix
    from kvpref.losses import LossOutput, loss
    from kvpref.models.compilation import compile_layers
    from kvpref.models.value_head import add_value_head
    from kvpref.parallel.sequence import sequence_parallel, sum_sequence_gradients
    from kvpref.plan.batch import Batch, collate
    from kvpref.plan.step import Step, join_batches
    from kvpref.records.groups import Group, Sequence
    from kvpref.records.images import Image, PlacedImage
    from kvpref.records.outputs import ResponseLogps, ResponseRewards
    from kvpref.records.requests import HeadOptions
    from kvpref.state.cache import PrefixCache
    from kvpref.training import PreferenceTrainer, PreferenceTrainingArguments

__version__ = "0.1.0"

_HOMES = {
    "Batch": "kvpref.plan.batch",
    "EngineOptions": "kvpref.engine.options",
    "Group": "kvpref.records.groups",
    "HeadOptions": "kvpref.records.requests",
    "Image": "kvpref.records.images",
    "InputError": "kvpref.errors",
    "LossOutput": "kvpref.losses",
    "PlacedImage": "kvpref.records.images",
    "PreferenceTrainer": "kvpref.training",
    "PreferenceTrainingArguments": "kvpref.training",
    "PrefixCache": "kvpref.state.cache",
    "ResponseLogps": "kvpref.records.outputs",
    "ResponseRewards": "kvpref.records.outputs",
    "RunError": "kvpref.errors",
    "Sequence": "kvpref.records.groups",
    "Step": "kvpref.plan.step",
    "TreeLogps": "kvpref.integrations.agent_loops",
    "UnsupportedModelError": "kvpref.errors",
    "add_value_head": "kvpref.models.value_head",
    "attach": "kvpref.engine.attaching",
    "collate": "kvpref.plan.batch",
    "compile_layers": "kvpref.models.compilation",
    "encode_prefix": "kvpref.engine.passes",
    "forward_backward": "kvpref.engine.schedules",
    "forward_backward_step": "kvpref.engine.schedules",
    "join_batches": "kvpref.plan.step",
    "loss": "kvpref.losses",
    "response_logps": "kvpref.engine.passes",
    "response_rewards": "kvpref.engine.passes",
    "score_responses": "kvpref.engine.passes",
    "sequence_parallel": "kvpref.parallel.sequence",
    "shared_prefix": "kvpref.integrations.shared_prefix",
    "sum_sequence_gradients": "kvpref.parallel.sequence",
    "tree_forward_backward": "kvpref.integrations.agent_loops",
    "tree_logps": "kvpref.integrations.agent_loops",
}

__all__ = [
    "Batch",
    "EngineOptions",
    "Group",
    "HeadOptions",
    "Image",
    "InputError",
    "LossOutput",
    "PlacedImage",
    "PreferenceTrainer",
    "PreferenceTrainingArguments",
    "PrefixCache",
    "ResponseLogps",
    "ResponseRewards",
    "RunError",
    "Sequence",
    "Step",
    "TreeLogps",
    "UnsupportedModelError",
    "add_value_head",
    "attach",
    "collate",
    "compile_layers",
    "encode_prefix",
    "forward_backward",
    "forward_backward_step",
    "join_batches",
    "loss",
    "response_logps",
    "response_rewards",
    "score_responses",
    "sequence_parallel",
    "shared_prefix",
    "sum_sequence_gradients",
    "tree_forward_backward",
    "tree_logps",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvpref' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

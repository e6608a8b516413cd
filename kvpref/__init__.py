"""kvpref: preference training that encodes each shared prompt once.

Names are imported on first use, so that `import kvpref` and `kvpref --help` stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpref.batch import Batch, collate
    from kvpref.errors import InputError, RunError, UnsupportedModelError
    from kvpref.groups import Group, Sequence
    from kvpref.losses import LossOutput, loss
    from kvpref.modeling.attach import attach
    from kvpref.modeling.cache import PrefixCache
    from kvpref.modeling.compilation import compile_layers
    from kvpref.modeling.options import EngineOptions
    from kvpref.modeling.passes import encode_prefix, response_logps, response_rewards, score_responses
    from kvpref.modeling.schedules import forward_backward, forward_backward_step
    from kvpref.modeling.shared_prefix import shared_prefix
    from kvpref.modeling.value_head import add_value_head
    from kvpref.outputs import HeadOptions, ResponseLogps, ResponseRewards
    from kvpref.step import Step, join_batches
    from kvpref.training import PreferenceTrainer, PreferenceTrainingArguments

__version__ = "0.1.0"

_HOMES = {
    "Batch": "kvpref.batch",
    "EngineOptions": "kvpref.modeling.options",
    "Group": "kvpref.groups",
    "HeadOptions": "kvpref.outputs",
    "InputError": "kvpref.errors",
    "LossOutput": "kvpref.losses",
    "PreferenceTrainer": "kvpref.training",
    "PreferenceTrainingArguments": "kvpref.training",
    "PrefixCache": "kvpref.modeling.cache",
    "ResponseLogps": "kvpref.outputs",
    "ResponseRewards": "kvpref.outputs",
    "RunError": "kvpref.errors",
    "Sequence": "kvpref.groups",
    "Step": "kvpref.step",
    "UnsupportedModelError": "kvpref.errors",
    "add_value_head": "kvpref.modeling.value_head",
    "attach": "kvpref.modeling.attach",
    "collate": "kvpref.batch",
    "compile_layers": "kvpref.modeling.compilation",
    "encode_prefix": "kvpref.modeling.passes",
    "forward_backward": "kvpref.modeling.schedules",
    "forward_backward_step": "kvpref.modeling.schedules",
    "join_batches": "kvpref.step",
    "loss": "kvpref.losses",
    "response_logps": "kvpref.modeling.passes",
    "response_rewards": "kvpref.modeling.passes",
    "score_responses": "kvpref.modeling.passes",
    "shared_prefix": "kvpref.modeling.shared_prefix",
}

__all__ = [
    "Batch",
    "EngineOptions",
    "Group",
    "HeadOptions",
    "InputError",
    "LossOutput",
    "PreferenceTrainer",
    "PreferenceTrainingArguments",
    "PrefixCache",
    "ResponseLogps",
    "ResponseRewards",
    "RunError",
    "Sequence",
    "Step",
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
    "shared_prefix",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvpref' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

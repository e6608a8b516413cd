"""A trainer whose model may be sharded: FSDP2 on any device, and references made while weights are still whole."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from kvpref.data import PreferenceDataset
from kvpref.errors import InputError
from kvpref.parallel.accelerate_fsdp2 import is_fsdp2, set_up_fsdp2, shard_frozen
from kvpref.training.constructors import ConstructedTrainer
from kvpref.training.fsdp_settings import is_fsdp_asked

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvpref.training.references import References


class ShardingTrainer(ConstructedTrainer):
    """`transformers.Trainer` that also runs FSDP2 on CPUs, and makes its references in time."""

    references: References

    def create_accelerator_and_postprocess(self) -> None:
        """As in `transformers.Trainer`."""
        super().create_accelerator_and_postprocess()
        set_up_fsdp2(self.accelerator, self.args.fsdp_plugin_args, is_asked=is_fsdp_asked(self.args))
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    @property
    def shard(self) -> Callable[[nn.Module], nn.Module] | None:
        """The function that shards a second model like the trained one, or None."""
        return partial(shard_frozen, self.accelerator) if self.is_fsdp_enabled else None

    def begin_references(self) -> None:
        """Before training, make all references, or the part that needs the weights before they are sharded.

        A sharded policy computes log-probs only after sharding, as it will in training.
        """
        if self.is_fsdp_enabled and not self._is_sharded():
            self.references.make_second()
        else:
            self._prepare_references()

    def _prepare_references(self) -> None:
        for name, dataset in (("train", self.train_dataset), ("eval", self.eval_dataset)):
            assert dataset is None or isinstance(dataset, PreferenceDataset)
            self.references.prepare(name, dataset)
        self.references.release()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:
            self._prepare_references()
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            self._prepare_references()  # while the weights are still the initial ones
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def check_can_evaluate(self) -> None:
        """Raise InputError if the model is still to be sharded: accelerate shards it only for training."""
        if self.is_fsdp_enabled and not self._is_sharded():
            raise InputError(
                "a model is sharded (FSDP) when training begins, and cannot be evaluated before; set "
                "eval_on_start=True, or evaluate it without FSDP"
            )

    def _is_sharded(self) -> bool:
        assert self.model is not None
        return is_fsdp2(self.model)

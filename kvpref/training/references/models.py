"""Models that give reference log-probs: another one, or the policy as it was before training."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from kvpref.engine.options import EngineOptions
from kvpref.engine.schedules import score
from kvpref.errors import InputError
from kvpref.models.partitioned import gathered
from kvpref.models.support import unwrap
from kvpref.parallel.whole_weights import whole
from kvpref.plan.batch import Batch
from kvpref.records.outputs import ResponseLogps
from kvpref.records.requests import HeadOptions
from kvpref.training.adapters import adapter_off, is_adapter_weight, trainable_weights
from kvpref.training.arguments import PreferenceTrainingArguments
from kvpref.training.loading.inputs import MicroBatchInputs

_SAMPLES_PER_TENSOR = 4096


class ReferenceSource(Protocol):
    """Where the reference log-probs of micro-batches come from."""

    def for_batch(self, inputs: MicroBatchInputs, batch: Batch) -> ResponseLogps:
        """Reference log-probs of one micro-batch, on its device and without gradient.

        Args:
            inputs: The micro-batch as collated.
            batch: Its batch on the training device.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a reference runs: like the policy, so that equal weights give equal log-probs."""

    options: Callable[[], EngineOptions]
    """Gives the engine's current options; chunks may shrink when memory runs out."""

    temperature: float = 1.0
    """Logits are divided by it; the loss's (`HeadOptions.temperature`)."""

    precision: torch.dtype | None = None
    """Dtype of mixed precision, or None."""

    autocasts: bool = True
    """Whether mixed precision is autocast; a sharded model gathers its weights in that precision instead."""

    @classmethod
    def of(
        cls,
        args: PreferenceTrainingArguments,
        *,
        temperature: float = 1.0,
        options: Callable[[], EngineOptions],
        autocasts: bool = True,
    ) -> Scoring:
        """The scoring that the arguments ask for."""
        if args.deepspeed_plugin is not None:  # DeepSpeed's models have the weights' dtype throughout
            return cls(options=options, temperature=temperature)
        precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        return cls(options=options, temperature=temperature, precision=precision, autocasts=autocasts)


class ModelReference:
    """A model whose weights are the reference as long as they do not change.

    Args:
        model_of: Gives the attached model. A function, because FSDP replaces the policy object.
        device: The model's device.
        scoring: How to run it.
        with_adapter: Whether the weights of its adapter count.

    Attributes:
        fingerprint: Fingerprint of the weights at construction.
        device: As given.
    """

    def __init__(
        self,
        model_of: Callable[[], nn.Module],
        device: torch.device,
        scoring: Scoring,
        *,
        with_adapter: bool = True,
    ) -> None:
        self.model_of, self.device, self.scoring = model_of, device, scoring
        self._with_adapter = with_adapter
        self.fingerprint = model_fingerprint(model_of(), with_adapter=with_adapter)

    def is_unchanged(self) -> bool:
        """Whether the weights are the same as at construction."""
        return model_fingerprint(self.model_of(), with_adapter=self._with_adapter) == self.fingerprint

    def for_batch(self, inputs: MicroBatchInputs, batch: Batch) -> ResponseLogps:
        """As in `ReferenceSource`; the forward pass runs on the model's device."""
        own = batch if batch.device == self.device else inputs.batch.to(self.device)
        with _in_eval_mode(self.model_of()) as model, self._mixed_precision(), self.as_reference(model):
            found = score(model, own, self.scoring.options(), head=HeadOptions(temperature=self.scoring.temperature))
        return ResponseLogps(
            token_logps=found.token_logps.to(batch.device),
            cu_seqlens=batch.cu_seqlens,
            group_index=batch.group_index,
            weights=batch.token_weights(found.token_logps.dtype),
        )

    def _mixed_precision(self) -> contextlib.AbstractContextManager[None]:
        # Accelerate puts only the policy's forward in autocast, and only once training begins.
        precision = self.scoring.precision
        if precision is None or not self.scoring.autocasts:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, precision)

    def as_reference(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """While open, `model` computes as the reference."""
        return contextlib.nullcontext()


class AdapterOffReference(ModelReference):
    """The policy with its adapter switched off: the base model, without a second one in memory."""

    def __init__(self, model_of: Callable[[], nn.Module], device: torch.device, scoring: Scoring) -> None:
        super().__init__(model_of, device, scoring, with_adapter=False)

    def as_reference(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return adapter_off(model)


class SavedWeightsReference(ModelReference):
    """The policy with its trained weights temporarily set back to a saved copy of the adapter.

    Weights that are not trained exist only once. Not for sharded models, whose parameters do not hold their weights.
    """

    def __init__(self, model_of: Callable[[], nn.Module], device: torch.device, scoring: Scoring) -> None:
        super().__init__(model_of, device, scoring)
        self._weights = {name: item.detach().clone() for name, item in trainable_weights(model_of()).items()}

    @contextlib.contextmanager
    def as_reference(self, model: nn.Module) -> Iterator[None]:
        weights = trainable_weights(model)
        changed = {name: weights[name].data for name in self._weights}
        try:
            for name, saved in self._weights.items():
                weights[name].data = saved.to(changed[name].device)
            yield
        finally:
            for name, own in changed.items():
                weights[name].data = own

    def weights(self) -> dict[str, torch.Tensor]:
        """The reference's own weights, to change in place."""
        return self._weights


class CopiedReference(ModelReference):
    """A second model, whose weights may follow the policy's."""

    def weights(self) -> dict[str, torch.Tensor]:
        """The reference's own weights, to change in place."""
        return {name: item.data for name, item in self.model_of().named_parameters()}


@torch.no_grad()
def mix_weights(weights: dict[str, torch.Tensor], policy: nn.Module, alpha: float) -> None:
    """``reference <- alpha policy + (1 - alpha) reference``, in place.

    The soft update of Gorbatovski et al. 2024 (TR-DPO, arXiv 2404.09656); with alpha 1 their hard update.
    """
    own = dict(policy.named_parameters())
    for name, weight in weights.items():
        dtype = torch.promote_types(weight.dtype, own[name].dtype)
        target = own[name].detach().to(weight.device, dtype)
        weight.copy_(torch.lerp(weight.to(dtype), target, alpha))


def check_mixable(weights: dict[str, torch.Tensor], policy: nn.Module) -> None:
    """Raise InputError if a reference model's weights cannot follow the policy's."""
    own = {name: tuple(item.shape) for name, item in policy.named_parameters()}
    other = {name: tuple(item.shape) for name, item in weights.items()}
    for name in sorted(own.keys() | other.keys()):
        if own.get(name) != other.get(name):
            raise InputError(
                "reference_sync_steps mixes the policy's weights into the reference's, so both need the same "
                f"architecture; {name} is {own.get(name, 'missing')} in the policy and "
                f"{other.get(name, 'missing')} in the reference model"
            )


def copy_model(model: nn.Module, device: torch.device) -> nn.Module:
    """A frozen copy on `device`, whose weights never exist twice on the model's own device unless that is `device`."""
    copies: dict[int, object] = {}
    for item in model.parameters():
        copies[id(item)] = nn.Parameter(item.detach().to(device, copy=True), requires_grad=False)
    for buffer in model.buffers():
        copies[id(buffer)] = buffer.detach().to(device, copy=True)
    return copy.deepcopy(model, copies)


def model_fingerprint(model: nn.Module, *, with_adapter: bool = False) -> str:
    """Hex SHA-256 over names, shapes and an even sample of the values of every parameter.

    A sample, because hashing every byte of a large model takes longer than the reference pass of a small dataset;
    an optimizer step changes nearly every value.

    Args:
        model: The model.
        with_adapter: Whether a PEFT adapter counts; not where it is switched off, or does nothing yet and is random.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(unwrap(model).state_dict(keep_vars=True).items()):
        if not with_adapter and is_adapter_weight(model, name):
            continue
        with gathered([tensor]):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            flat = whole(tensor).flatten()
            stride = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
            digest.update(flat[::stride].float().cpu().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    if not model.training:
        yield model
        return
    model.eval()
    try:
        yield model
    finally:
        model.train()

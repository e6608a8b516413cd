"""`PreferenceTrainer`: a `transformers.Trainer` whose training step runs kvpref's engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from kvpref.batch import ResponseLogps
from kvpref.data import PreferenceDataset, StepSampler
from kvpref.errors import InputError, RunError
from kvpref.groups import Group
from kvpref.losses import LossFunction, LossOutput, PreferenceLoss, as_loss
from kvpref.modeling.attach import attach
from kvpref.modeling.compilation import compile_layers
from kvpref.modeling.passes import response_logps
from kvpref.modeling.schedules import forward_backward
from kvpref.training.arguments import PreferenceTrainingArguments
from kvpref.training.callbacks import EpochCallback, MetricsFileCallback, ThroughputProgressCallback
from kvpref.training.inputs import (
    MicroBatchInputs,
    check_lengths,
    make_cost_model,
    make_loader,
    make_planner,
    select_groups,
)
from kvpref.training.meters import MetricMeter, TokenMeter
from kvpref.training.reference import ReferenceLogps, load_or_compute

Step = list[MicroBatchInputs]


class PreferenceTrainer(Trainer):
    """Train a causal language model on preference data, each shared prompt encoded once.

    Schedulers, logging, checkpoints, resuming, accelerate and callbacks are those of `transformers.Trainer`.

    Args:
        model: A causal language model of a supported family, possibly a PEFT model. It is attached here.
        args: The arguments; they also name the loss, unless `loss` is given.
        train_dataset: From `kvpref.data.load_preferences`, or a list of `kvpref.Group`.
        eval_dataset: The same, for evaluation.
        loss: A loss of your own: ``loss(policy, reference, batch) -> LossOutput``.
        processing_class: The tokenizer, saved beside the model.
        callbacks: As in `transformers.Trainer`.
        **kwargs: Further arguments of `transformers.Trainer`, such as `optimizers`.

    Raises:
        UnsupportedModelError: If the model would not be computed exactly.
        InputError: If the data does not fit the loss or the token budget.
    """

    args: PreferenceTrainingArguments
    model: nn.Module
    train_dataset: PreferenceDataset | None  # type: ignore[assignment]
    eval_dataset: PreferenceDataset | None  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        args: PreferenceTrainingArguments,
        train_dataset: PreferenceDataset | list[Group] | None = None,
        eval_dataset: PreferenceDataset | list[Group] | None = None,
        *,
        loss: PreferenceLoss | LossFunction | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        attach(model)
        if args.compile_layers:
            compile_layers(model)
        self._cost_model = make_cost_model(model)
        self.loss = as_loss(args.make_loss() if loss is None else loss)
        self._references: dict[str, ReferenceLogps | None] = {}
        self._metric_meter, self.token_meter = MetricMeter(), TokenMeter()
        super().__init__(
            model=model,
            args=args,
            train_dataset=select_groups(train_dataset, self.loss),
            eval_dataset=select_groups(eval_dataset, self.loss),
            processing_class=processing_class,
            callbacks=[MetricsFileCallback(), *(callbacks or [])],
            **kwargs,
        )
        self._replace_progress()
        for dataset in (self.train_dataset, self.eval_dataset):
            if dataset is not None:
                check_lengths(dataset, self.model)

    # What feeds the loop

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Optimizer steps of `per_device_train_batch_size` groups, already cut for this rank."""
        if self.train_dataset is None:
            raise InputError("training needs a train_dataset")
        loader = self._make_loader(self.train_dataset, self.args.per_device_train_batch_size, shuffle=True)
        self.remove_callback(EpochCallback)
        assert isinstance(loader.batch_sampler, StepSampler)
        self.add_callback(EpochCallback(loader.batch_sampler))
        return loader

    def _make_loader(self, dataset: PreferenceDataset, groups_per_device: int, *, shuffle: bool) -> DataLoader[Any]:
        planner = make_planner(
            dataset, self.args, groups_per_device=groups_per_device, shuffle=shuffle, cost_model=self._cost_model
        )
        return make_loader(dataset, planner, self.args)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Step], num_batches: int, device: torch.device
    ) -> tuple[list[Step], int]:
        """The steps of one optimizer update, and the number of loss units in them over all ranks."""
        steps = [step for _, step in zip(range(num_batches), epoch_iterator, strict=False)]
        num_units = sum(self._num_units(inputs) for step in steps for inputs in step)
        return steps, self._sum_over_ranks(num_units)

    def _num_units(self, inputs: MicroBatchInputs) -> int:
        return 0 if inputs.is_filler else self.loss.num_units(inputs.batch)

    def _sum_over_ranks(self, count: int) -> int:
        if self.args.world_size == 1:
            return count
        return int(self.accelerator.reduce(torch.tensor(count, device=self.args.device), reduction="sum").item())

    # The loop's body

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Step, num_items_in_batch: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Forward and backward over the micro-batches of one step; the loss of the step, detached.

        Each micro-batch is weighted by its share of the optimizer step's units over all ranks, so the gradient does
        not depend on how groups were split into micro-batches and ranks.
        """
        model.train()
        set_train_mode = getattr(self.optimizer, "train", None)
        if callable(set_train_mode):  # schedule-free optimizers have modes of their own
            set_train_mode()
        self.token_meter.start()
        losses: list[torch.Tensor] = []
        for index, micro_batch in enumerate(inputs):
            is_last = index == len(inputs) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                losses.append(self._train_micro_batch(model, micro_batch, num_items_in_batch))
        self._check_finite(losses, inputs)
        self.token_meter.stop()
        return torch.stack(losses).sum()

    def _train_micro_batch(
        self, model: nn.Module, inputs: MicroBatchInputs, num_units_in_step: int | torch.Tensor | None
    ) -> torch.Tensor:
        args, num_units = self.args, self._num_units(inputs)
        # Distributed wrappers average gradients over ranks; the loss is a sum over ranks of weighted means.
        weight = num_units * args.world_size / num_units_in_step  # type: ignore[operator]
        batch = inputs.batch.to(args.device)
        output = forward_backward(
            model,
            batch,
            self.loss,
            reference=self._reference_of("train", self.train_dataset, inputs, batch),
            mode=args.mode,
            schedule=args.schedule,
            backend=args.backend,
            backward=lambda loss: self.accelerator.backward(loss * weight),
        )
        if not inputs.is_filler:
            self._metric_meter.add(output.metrics, num_units)
            self.token_meter.add(batch, args.mode)
        return output.loss.float() * weight

    def _check_finite(self, losses: list[torch.Tensor], inputs: Step) -> None:
        for value, micro_batch in zip(torch.stack(losses).tolist(), inputs, strict=True):
            if value - value != 0:  # NaN or infinite
                ids = ", ".join(str(group.id) for group in micro_batch.batch.groups[:3])
                raise RunError(
                    f"the loss is {value} at optimizer step {self.state.global_step + 1}, in a micro-batch that starts "
                    f"with {ids}; the weights were not changed by this step and earlier checkpoints are intact. Lower "
                    "the learning rate or look at those rows, then continue with --resume"
                )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; reference log-probs are computed first, with the weights as they are before training."""
        self._prepare_reference("train", self.train_dataset)
        if self.eval_dataset is not None:
            self._prepare_reference("eval", self.eval_dataset)
        return super().train(*args, **kwargs)

    def _prepare_reference(self, name: str, dataset: PreferenceDataset | None) -> None:
        if name in self._references:
            return
        self._references[name] = None
        if self.loss.needs_reference and dataset is not None:
            folder = self.args.reference_logps_dir or Path(self.args.output_dir or ".") / "reference_logps"
            path = Path(folder) / f"{name}.safetensors"
            self._references[name] = load_or_compute(self.model, dataset, self.args, path)

    def _reference_of(
        self, name: str, dataset: PreferenceDataset | None, inputs: MicroBatchInputs, batch: Any
    ) -> ResponseLogps | None:
        self._prepare_reference(name, dataset)
        reference = self._references[name]
        return None if reference is None else reference.for_batch(inputs.group_indices, batch, self.args.mode)

    # Evaluation and logging

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: PreferenceDataset | list[Group] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss and metrics over a dataset, over all ranks.

        Args:
            eval_dataset: Another dataset than the trainer's; the loss must not need reference log-probs then.
            ignore_keys: Not used; present for `transformers.Trainer`'s callers.
            metric_key_prefix: Put before each name.
        """
        if eval_dataset is not None and eval_dataset is not self.eval_dataset and self.loss.needs_reference:
            raise InputError(
                "pass eval_dataset to PreferenceTrainer: its reference log-probs are computed before training"
            )
        dataset = self.eval_dataset if eval_dataset is None else select_groups(eval_dataset, self.loss)
        if dataset is None:
            raise InputError("evaluation needs an eval_dataset")
        args, meter = self.args, MetricMeter()
        loader = self._make_loader(dataset, args.per_device_eval_batch_size, shuffle=False)
        model = self.model_wrapped
        model.eval()
        with torch.no_grad():
            for step in loader:
                for inputs in step:
                    output = self._evaluate_micro_batch(model, dataset, inputs)
                    meter.add({"loss": output.loss, **output.metrics}, self._num_units(inputs))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in meter.pop(args.world_size).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def _evaluate_micro_batch(
        self, model: nn.Module, dataset: PreferenceDataset, inputs: MicroBatchInputs
    ) -> LossOutput:
        batch = inputs.batch.to(self.args.device)
        policy = response_logps(model, batch, mode=self.args.mode, backend=self.args.backend)
        return self.loss(policy, self._reference_of("eval", dataset, inputs, batch), batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the loss's metrics and the throughput to the log lines of training."""
        if "loss" in logs:
            logs = {**logs, **self._metric_meter.pop(self.args.world_size)}
            logs.update(self.token_meter.rates(self.args.world_size))
        super().log(logs, *args, **kwargs)

    # Saving

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As in `transformers.Trainer`; a failed write raises RunError."""
        with self._saving():
            super().save_model(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._saving():
            super()._save_checkpoint(*args, **kwargs)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except RunError:
            raise
        except (OSError, SafetensorError, RuntimeError) as error:
            # A full disk shows as any of the three, depending on which file was being written.
            raise RunError(
                f"cannot save to {self.args.output_dir} at step {self.state.global_step}: {error}; earlier checkpoints "
                "are intact. Make room (or fix permissions), then continue with --resume"
            ) from error

    def floating_point_ops(self, inputs: Step) -> int:  # type: ignore[override]
        """Training FLOPs of a step's linear layers: 6 per parameter and token that runs through the layers."""
        num_tokens = sum(item.batch.plan(self.args.mode).num_forward_tokens for item in inputs)
        return 6 * num_tokens * sum(parameter.numel() for parameter in self.model.parameters())

    def _replace_progress(self) -> None:
        for callback in (PrinterCallback, ProgressCallback):
            if self.pop_callback(callback) is not None and not self.args.disable_tqdm:
                self.add_callback(ThroughputProgressCallback(self.token_meter))

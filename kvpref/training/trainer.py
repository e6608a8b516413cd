"""`PreferenceTrainer`: a `transformers.Trainer` whose training step runs kvpref's engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from kvpref.data import PreferenceDataset, StepSampler
from kvpref.engine.reads import reads_of
from kvpref.engine.schedules import score
from kvpref.errors import InputError
from kvpref.losses import LossFunction, LossOutput, PreferenceLoss, as_loss
from kvpref.models.attach import attach
from kvpref.models.compilation import compile_layers
from kvpref.parallel.deepspeed import whole_weights
from kvpref.plan.batch import Batch
from kvpref.records.outputs import ResponseLogps
from kvpref.training.arguments import PreferenceTrainingArguments
from kvpref.training.callbacks import (
    EpochCallback,
    MetricsFileCallback,
    SyncReferenceCallback,
    ThroughputProgressCallback,
)
from kvpref.training.checks import check_data, check_learnable, check_run, check_settings
from kvpref.training.datasets import PreferenceData, prepare_data
from kvpref.training.deepspeed import cast_weights, change_weights
from kvpref.training.defaults import token_budget, with_defaults
from kvpref.training.finite import LossCheck
from kvpref.training.freezing import freeze_vision
from kvpref.training.hub import HubTrainer
from kvpref.training.kinds import check_types
from kvpref.training.loading.batcher import make_batcher, make_cost_model, runs_larger_in_chunks
from kvpref.training.loading.inputs import MicroBatchInputs, StepInputs
from kvpref.training.loading.loader import make_loader
from kvpref.training.meters import MetricMeter, linear_flops
from kvpref.training.preflight import check_saving
from kvpref.training.references import References
from kvpref.training.row_groups import split_over_ranks
from kvpref.training.run_meters import RunMeters
from kvpref.training.step_runner import RunnerSettings, StepRunner
from kvpref.training.units import shares, sum_over_ranks, weighted


class PreferenceTrainer(HubTrainer):
    """Train a causal language model on preference data, each shared prompt encoded once.

    Schedulers, logging, checkpoints, resuming, accelerate and callbacks are those of `transformers.Trainer`.

    Args:
        model: A causal language model of a supported family, possibly a PEFT model. It is attached here.
        args: The arguments; they also name the loss, unless `loss` is given.
        train_dataset: From `kvpref.data.load_preferences`, a list of `kvpref.Group`; or rows (a `datasets.Dataset`, a
            list of dicts, the path of a file), which `processing_class` tokenizes.
        eval_dataset: The same, for evaluation.
        loss: Your own loss: ``loss(policy, reference, batch) -> LossOutput``.
        reference_model: The reference, instead of `model` in its initial state. It is attached and put in eval mode.
        processing_class: The tokenizer; it tokenizes rows and is saved beside the model.
        callbacks: As in `transformers.Trainer`.
        **kwargs: Further arguments of `transformers.Trainer`, such as `optimizers`.

    Raises:
        UnsupportedModelError: If the model would not be computed exactly.
        InputError: If arguments, model, data, loss, reference and token budget do not fit one another.
    """

    args: PreferenceTrainingArguments
    model: nn.Module
    train_dataset: PreferenceDataset | None  # type: ignore[assignment]
    eval_dataset: PreferenceDataset | None  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        args: PreferenceTrainingArguments,
        train_dataset: PreferenceData | None = None,
        eval_dataset: PreferenceData | None = None,
        *,
        loss: PreferenceLoss | LossFunction | None = None,
        reference_model: nn.Module | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        check_types(model, args, loss, reference_model)
        self.loss = as_loss(args.make_loss() if loss is None else loss)
        check_settings(model, args, self.loss, eval_dataset)
        args = with_defaults(args, self.loss, model)
        attach(model, padded_only=args.mode == "padded")
        if args.freeze_vision:
            freeze_vision(model)
        if args.compile_layers:
            compile_layers(model)
        self._cost_model = make_cost_model(model, args.mode)
        self._meters, self._loss_check = RunMeters(args.device, args.sequence_parallel), LossCheck()
        self.token_meter = self._meters.tokens
        super().__init__(
            model=model,
            args=args,
            train_dataset=prepare_data(train_dataset, "train_dataset", self.loss, args, processing_class),
            eval_dataset=prepare_data(eval_dataset, "eval_dataset", self.loss, args, processing_class),
            processing_class=processing_class,
            callbacks=[MetricsFileCallback(), *(callbacks or [])],
            **kwargs,
        )
        split_over_ranks(self.model, args.sequence_parallel)
        cast_weights(model, self.accelerator)
        settings = RunnerSettings(
            options=args.engine_options(),
            max_tokens_per_micro_batch=token_budget(args, self.train_dataset),
            larger_in_chunks=runs_larger_in_chunks(args),
            shares=args.share_across_micro_batches,
            auto_budget=args.auto_budget,
            report=lambda line: print(line, file=sys.stderr) if args.process_index == 0 else None,
        )
        self._step_runner = StepRunner(self.accelerator, self.loss, settings)
        self.references = References(
            lambda: self.model,
            args,
            self.loss,
            lambda: self._step_runner.settings.options,
            reference_model,
            shard=self.shard,
        )
        self._replace_progress()
        if args.reference_sync_steps is not None:
            self.add_callback(SyncReferenceCallback(self.references.sync, args.reference_sync_steps))
        check_run(self.model, args, self.loss, {"train": self.train_dataset, "eval": self.eval_dataset})

    # Data for the loop

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Optimizer steps of `per_device_train_batch_size` groups, already cut for this rank."""
        if self.train_dataset is None:
            raise InputError("training needs a train_dataset")
        loader = self._make_loader(self.train_dataset, self.args.per_device_train_batch_size, shuffle=True)
        self.remove_callback(EpochCallback)
        assert isinstance(loader.batch_sampler, StepSampler)
        self._meters.watch(loader.batch_sampler.batcher)
        self.add_callback(EpochCallback(loader.batch_sampler))
        return loader

    def _make_loader(self, dataset: PreferenceDataset, groups_per_device: int, *, shuffle: bool) -> DataLoader[Any]:
        reads = reads_of(self.model, self.loss.reads)
        batcher = make_batcher(
            dataset, self.args, reads, groups_per_device=groups_per_device, shuffle=shuffle, cost_model=self._cost_model
        )
        return make_loader(dataset, batcher, self.args, reads=reads, loss=self.loss)

    def get_batch_samples(  # type: ignore[override]
        self, epoch_iterator: Iterator[StepInputs], num_batches: int, device: torch.device
    ) -> tuple[list[StepInputs], float | torch.Tensor]:
        """The steps of one optimizer update, and their number of loss units over all ranks."""
        steps = [step for _, step in zip(range(num_batches), epoch_iterator, strict=False)]
        num_units = sum(self._num_units(inputs) for step in steps for inputs in step)
        return steps, sum_over_ranks(self.accelerator, num_units, self.args.sequence_parallel)

    def _num_units(self, inputs: MicroBatchInputs) -> float:
        return 0 if inputs.is_filler else self.loss.num_units(inputs.batch)

    # The loop's body

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: StepInputs, num_items_in_batch: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Forward and backward over the micro-batches of one step; the loss of the step, detached.

        Each micro-batch is weighted by its share of the optimizer step's units over all ranks, so the gradient does
        not depend on how groups were split into micro-batches and ranks.
        """
        model.train()
        set_train_mode = getattr(self.optimizer, "train", None)
        if callable(set_train_mode):  # schedule-free optimizers have train and eval modes
            set_train_mode()
        self.token_meter.start()
        units = [self._num_units(item) for item in inputs]
        weights = shares(units, num_items_in_batch, self.args.world_size)
        with self._meters.memory.watching(), self.references.whole_weights():
            result = self._step_runner.run(model, inputs, weights, self._train_reference)
        self._loss_check.add(result, inputs)
        if self.accelerator.sync_gradients:  # the weights change next
            self._loss_check.stop_if_not_finite(self.model, self.loss, self.state.global_step + 1, self.args.output_dir)
            change_weights(model)
        self._meters.add(inputs, result, units)
        losses = [weighted(item.loss.float(), weight) for item, weight in zip(result.outputs, weights, strict=True)]
        return (
            torch.stack(losses).sum() / self.args.sequence_parallel
        )  # ranks that share micro-batches report the same loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, after trying to save and making the reference from the current weights.

        Raises:
            InputError: If the output folder cannot be written to.
            RunError: If something cannot be saved, or the disk is too full; or the loss is not finite.
        """
        if self.args.should_save:
            for line in check_saving(self):
                print(line, file=sys.stderr)
        self.begin_references()
        return super().train(*args, **kwargs)

    def _train_reference(self, inputs: MicroBatchInputs, batch: Batch) -> ResponseLogps | None:
        self.references.prepare("train", self.train_dataset)
        return self.references.for_batch("train", inputs, batch)

    # Evaluation and logging

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: PreferenceData | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss and metrics over a dataset, over all ranks.

        Args:
            eval_dataset: A dataset other than the trainer's; its reference log-probs are computed when needed.
            ignore_keys: Not used; present for `transformers.Trainer`'s callers.
            metric_key_prefix: Prefix of each name.

        Raises:
            InputError: If there is no dataset, or its reference is gone: the model as it was before training, unless
                it was kept (`precompute_reference=False`).
        """
        self.check_can_evaluate()
        is_own = eval_dataset is None or eval_dataset is self.eval_dataset
        dataset = self.eval_dataset
        if eval_dataset is not None and not is_own:
            dataset = prepare_data(eval_dataset, "eval_dataset", self.loss, self.args, self.processing_class)
        if dataset is None:
            raise InputError("evaluation needs an eval_dataset")
        if is_own:
            self.references.prepare("eval", dataset)
        else:
            check_data(dataset, self.model, self.loss)
            check_learnable(dataset, self.loss, metric_key_prefix)
            self.references.check_can_score(dataset)
        args, meter = self.args, MetricMeter()
        loader = self._make_loader(dataset, args.per_device_eval_batch_size, shuffle=False)
        model, handler = self.model_wrapped, self.callback_handler
        handler.eval_dataloader = loader  # what the progress bar counts
        model.eval()
        with torch.no_grad(), whole_weights(model), self.references.whole_weights():
            for step in loader:
                for inputs in step:
                    output = self._evaluate_micro_batch(model, inputs, "eval" if is_own else "other")
                    meter.add({"loss": output.loss, **output.metrics}, self._num_units(inputs))
                self.control = handler.on_prediction_step(args, self.state, self.control)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in meter.pop(args.world_size).items()}
        self.log(metrics)
        self.control = handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def _evaluate_micro_batch(self, model: nn.Module, inputs: MicroBatchInputs, name: str) -> LossOutput:
        batch = inputs.batch.to(self.args.device)
        policy = score(model, batch, self._step_runner.settings.options, head=self.loss.head, reads=self.loss.reads)
        reference = self.references.for_batch(name, inputs, batch)
        return self.loss(policy, reference, batch)  # type: ignore[arg-type]  # the loss says which it reads

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the loss's metrics and the throughput to the log lines of training."""
        if "loss" in logs:
            logs = {**logs, **self._meters.pop(self.args.world_size)}
        super().log(logs, *args, **kwargs)

    # Saving

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.references.load(Path(checkpoint))

    def floating_point_ops(self, inputs: StepInputs) -> int:  # type: ignore[override]
        """Training FLOPs of a step's linear layers: 6 per parameter and token that runs through the layers."""
        return linear_flops(self.model, inputs.num_forward_tokens(self.args.mode)) // self.args.sequence_parallel

    def _replace_progress(self) -> None:
        for callback in (PrinterCallback, ProgressCallback):
            if self.pop_callback(callback) is not None and not self.args.disable_tqdm:
                self.add_callback(ThroughputProgressCallback(self.token_meter))

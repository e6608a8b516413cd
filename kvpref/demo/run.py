"""The demonstration from data to picture."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kvpref.atomic_files import write_text
from kvpref.data import PreferenceDataset, load_preferences
from kvpref.demo.comparison import Comparison, compare_modes, prepare_batches
from kvpref.demo.config import DemoConfig
from kvpref.demo.evaluation import Evaluation, evaluate
from kvpref.demo.files import MODEL_FOLDER, PLOT_FILE, RESULT_FILE, claim
from kvpref.demo.model import build_model, build_tokenizer
from kvpref.demo.plot import draw
from kvpref.demo.result import DemoResult, LossPoint
from kvpref.demo.task import Pair, make_pairs, write_pairs
from kvpref.losses import DPO
from kvpref.models.attach import attach
from kvpref.training import PreferenceTrainer, PreferenceTrainingArguments

Report = Callable[[str], None]

LOGS_PER_STAGE = 20


def run_demo(config: DemoConfig, output: Path, report: Report) -> DemoResult:
    """Make the data, train with `sft` and `dpo`, compare the modes, and save model, result and picture.

    Args:
        config: Sizes and the seed.
        output: Folder for all files; those of an earlier demonstration are replaced.
        report: Takes lines of progress.

    Raises:
        InputError: If `output` is a file, or a folder with other files.
    """
    claim(output)
    return _Demo(config, output, report).run()


class _Demo:
    """The parts of the demonstration, in order, with what they pass on."""

    def __init__(self, config: DemoConfig, output: Path, report: Report) -> None:
        self.config, self.output, self.report = config, output, report
        self.tokenizer = build_tokenizer()
        self.model = attach(build_model(self.tokenizer, config.seed))
        self.evaluations: dict[str, Evaluation] = {}
        self.loss_curves: dict[str, list[LossPoint]] = {}
        self.seconds: dict[str, float] = {}

    def run(self) -> DemoResult:
        config = self.config
        with self._timed("total"):
            eval_pairs = self._write_data()
            train, held_out = (self._load(name) for name in ("train", "eval"))
            self._evaluate("start", eval_pairs, held_out)
            self._train("sft", train, config.num_sft_steps, config.sft_learning_rate)
            self._evaluate("sft", eval_pairs, held_out)
            # The reference of the comparison, as of `dpo`, is the model before `dpo`.
            batches = prepare_batches(
                self.model, train, groups_per_step=config.groups_per_step, num_steps=config.num_compared_steps
            )
            self._train("dpo", train, config.num_dpo_steps, config.dpo_learning_rate, beta=config.beta)
            self._evaluate("dpo", eval_pairs, held_out)
            self.report("comparing the modes on the same batches")
            with self._timed("comparison"):
                comparison = compare_modes(self.model, batches, DPO(beta=config.beta), config.num_rounds)
        return self._save(comparison)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start

    def _write_data(self) -> list[Pair]:
        train, held_out = make_pairs(self.config.seed, self.config.num_train_pairs, self.config.num_eval_pairs)
        write_pairs(train, self.output / "train.jsonl")
        write_pairs(held_out, self.output / "eval.jsonl")
        self.report(f"made {len(train)} training pairs and {len(held_out)} held-out pairs")
        return held_out

    def _load(self, name: str) -> PreferenceDataset:
        return load_preferences(str(self.output / f"{name}.jsonl"), self.tokenizer)

    def _evaluate(self, stage: str, pairs: list[Pair], groups: PreferenceDataset) -> None:
        found = self.evaluations[stage] = evaluate(self.model, self.tokenizer, pairs, groups)
        self.report(f"{stage}: {found.accuracy:.1%} of held-out questions answered right")

    def _train(
        self, loss: str, groups: PreferenceDataset, num_steps: int, learning_rate: float, **loss_args: Any
    ) -> None:
        config, curve = self.config, self.loss_curves.setdefault(loss, [])
        args = PreferenceTrainingArguments(
            output_dir=str(self.output / loss),
            loss=loss,
            loss_args=loss_args,
            per_device_train_batch_size=config.groups_per_step,
            max_tokens_per_micro_batch=None,  # steps are short
            max_steps=num_steps,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=num_steps // 8,
            weight_decay=0.0,
            # The default of 0.999 averages over a thousand steps; there are only hundreds here.
            adam_beta2=0.98,
            logging_steps=max(1, num_steps // LOGS_PER_STAGE),
            save_strategy="no",
            report_to=[],
            seed=config.seed,
            disable_tqdm=True,
        )
        progress = _ProgressCallback(loss, num_steps, curve, self.report)
        trainer = PreferenceTrainer(self.model, args, train_dataset=groups, callbacks=[progress])
        with self._timed(loss):
            trainer.train()

    def _save(self, comparison: Comparison) -> DemoResult:
        self.model.save_pretrained(self.output / MODEL_FOLDER)
        self.tokenizer.save_pretrained(self.output / MODEL_FOLDER)
        result = DemoResult(
            config=self.config,
            evaluations=self.evaluations,
            loss_curves=self.loss_curves,
            seconds=self.seconds,
            comparison=comparison,
        )
        write_text(self.output / RESULT_FILE, json.dumps(result.to_json(), indent=2) + "\n")
        if not draw(result, self.output / PLOT_FILE):
            self.report("no picture: matplotlib is not installed (pip install 'kvpref[plot]')")
        return result


class _ProgressCallback(TrainerCallback):
    """Keeps the losses of a stage and reports some of them."""

    def __init__(self, stage: str, num_steps: int, curve: list[LossPoint], report: Report) -> None:
        self.stage, self.num_steps, self.curve, self.report = stage, num_steps, curve, report

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.curve.append(LossPoint(state.global_step, logs["loss"]))
            self.report(f"{self.stage}: step {state.global_step} of {self.num_steps}, loss {logs['loss']:.3f}")

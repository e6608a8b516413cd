"""The same run with TRL's trainer and with kvpref's: tiny model, made-up data, what was logged and computed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import VOCAB_SIZE, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

NUM_STEPS = 10
# Wall-clock times, which no two runs share.
_TIMES = ("runtime", "per_second", "step_time", "total_flos", "perf/")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word ``w3``; no network, no merges."""
    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(3, VOCAB_SIZE))]
    model = WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def save_model(path: Path, variant: str = "llama", **overrides: Any) -> str:
    """A tiny model and its tokenizer on disk, where TRL loads the reference from."""
    tiny_model(variant, **overrides).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def make_args(config_class: Any, output: Path, **options: Any) -> Any:
    """TRL's defaults, but fp32 on the CPU, a few large steps, and everything logged."""
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return config_class(**{**settings, **options})


class Words:
    """Texts of random words, the same for the same seed."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def text(self, low: int, high: int) -> str:
        return " ".join(f"w{self._random.randrange(3, VOCAB_SIZE)}" for _ in range(self._random.randint(low, high)))

    def prompt(self) -> str:
        """Long enough to be shared."""
        return self.text(18, 30) + " "

    def flag(self) -> bool:
        return self._random.random() < 0.5


def pairs(num_rows: int = 24, seed: int = 0) -> Dataset:
    """Prompt, chosen and rejected, of varied lengths."""
    words = Words(seed)
    rows = [
        {"prompt": words.prompt(), "chosen": words.text(1, 12), "rejected": words.text(1, 12)} for _ in range(num_rows)
    ]
    return Dataset.from_list(rows)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run left behind."""

    losses: list[float]
    """Of every micro-batch, in order, training and evaluation."""

    logs: list[dict[str, float]]
    """Every log entry without times."""

    num_layer_tokens: int
    """Tokens that the policy's first layer saw in training mode, padding included."""

    before: dict[str, torch.Tensor]
    """Trained weights before training."""

    after: dict[str, torch.Tensor]
    """And after."""


def run(trainer: Any) -> Run:
    """Train, and record."""
    losses: list[float] = []
    compute_loss, seen = trainer.compute_loss, []

    def recording(*args: Any, **kwargs: Any) -> Any:
        result = compute_loss(*args, **kwargs)
        losses.append(float((result[0] if isinstance(result, tuple) else result).detach()))
        return result

    trainer.compute_loss = recording
    layer = next(module for name, module in trainer.model.named_modules() if name.endswith("layers.0"))
    layer.register_forward_pre_hook(_count_into(seen), with_kwargs=True)
    before = _weights(trainer.model)
    trainer.train()
    logs = [
        {name: value for name, value in entry.items() if not any(time in name for time in _TIMES)}
        for entry in trainer.state.log_history
    ]
    after = _weights(trainer.model)
    return Run(losses=losses, logs=logs, num_layer_tokens=sum(seen), before=before, after=after)


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def _count_into(seen: list[int]) -> Any:
    def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            hidden = args[0] if args else kwargs["hidden_states"]
            seen.append(hidden.shape[0] * hidden.shape[1])

    return hook


def assert_same(found: Run, truth: Run, *, tolerance: float = 1e-5, num_steps: int = NUM_STEPS) -> None:
    """Losses to `tolerance`; log entries by name, and their values and the weights as close as that lets them be.

    Adam divides gradients by their size, so rounding in a gradient near zero moves a weight by more than rounding.
    """
    assert len(found.losses) == len(truth.losses) >= num_steps
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(truth.losses), rtol=tolerance, atol=tolerance)
    assert [sorted(entry) for entry in found.logs] == [sorted(entry) for entry in truth.logs]
    for ours, theirs in zip(found.logs, truth.logs, strict=True):
        for name, value in theirs.items():
            # None where nothing was to be averaged.
            near = None if value is None else pytest.approx(value, rel=20 * tolerance, abs=20 * tolerance)
            assert ours[name] == near, name
    moved = sum(float((truth.after[name] - before).norm()) for name, before in truth.before.items())
    apart = sum(float((truth.after[name] - after).norm()) for name, after in found.after.items())
    assert moved > 0.1  # or equal losses would say nothing
    assert apart < 0.01 * moved

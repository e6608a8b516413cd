"""The same run with TRL's trainer and with kvpref's: tiny model, made-up data, what was logged and computed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny_models import VOCAB_SIZE, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

NUM_STEPS = 10
# Wall-clock times, which no two runs share.
_TIMES = ("runtime", "per_second", "step_time", "total_flos")


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

    weights: dict[str, torch.Tensor]
    """Of the model, after training."""


def run(trainer: Any, *, evaluates: bool = False) -> Run:
    """Train, record."""
    losses: list[float] = []
    compute_loss, seen = trainer.compute_loss, []

    def recording(*args: Any, **kwargs: Any) -> Any:
        result = compute_loss(*args, **kwargs)
        losses.append(float((result[0] if isinstance(result, tuple) else result).detach()))
        return result

    trainer.compute_loss = recording
    layer = next(module for name, module in trainer.model.named_modules() if name.endswith("layers.0"))
    layer.register_forward_pre_hook(_count_into(seen), with_kwargs=True)
    trainer.train()
    if evaluates:
        trainer.evaluate()
    logs = [
        {name: value for name, value in entry.items() if not any(time in name for time in _TIMES)}
        for entry in trainer.state.log_history
    ]
    weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    return Run(losses=losses, logs=logs, num_layer_tokens=sum(seen), weights=weights)


def _count_into(seen: list[int]) -> Any:
    def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            hidden = args[0] if args else kwargs["hidden_states"]
            seen.append(hidden.shape[0] * hidden.shape[1])

    return hook


def assert_same(found: Run, truth: Run, *, tolerance: float = 1e-5) -> None:
    """Losses to `tolerance`, log entries by name, and their values as close as fp32 sums in another order allow."""
    assert len(found.losses) == len(truth.losses) >= NUM_STEPS
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(truth.losses), rtol=tolerance, atol=tolerance)
    assert [sorted(entry) for entry in found.logs] == [sorted(entry) for entry in truth.logs]
    for ours, theirs in zip(found.logs, truth.logs, strict=True):
        for name, value in theirs.items():
            assert abs(ours[name] - value) <= 20 * tolerance * max(1.0, abs(value)), (name, ours[name], value)
    # The runs must have gone somewhere, or equal losses would say nothing.
    assert max(truth.losses) - min(truth.losses) > 100 * tolerance

"""The policy gradients on a model, against TRL's own loss, gradient and metrics for the same samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs the extra kvpref[trl]")

import trl_runs  # noqa: E402
from datasets import Dataset  # noqa: E402
from tiny_models import VOCAB_SIZE, tiny_model  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from trl.trainer.utils import nanstd  # noqa: E402

import kvpref  # noqa: E402
from kvpref.losses import PreferenceLoss, make_loss  # noqa: E402

# float32 losses of order one
TOLERANCE = 1e-6
# float32 gradients, summed in another order
GRADIENT_TOLERANCE = 1e-5

MAX_LENGTH = 16
REWARDS = torch.tensor([[0.0, 1.0, 0.25, 0.75], [1.0, 0.0, 0.0, 0.5], [0.5, 0.5, 0.5, 0.5]])

# TRL's arguments, and kvpref's name and settings.
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, "grpo", {}),
    "grpo with KL": ({"loss_type": "grpo", "beta": 0.2}, "grpo", {"beta": 0.2}),
    "grpo with KL uncorrected": (
        {"loss_type": "grpo", "beta": 0.2, "use_bias_correction_kl": False},
        "grpo",
        {"beta": 0.2, "correct_kl": False},
    ),
    "two-sided clipping": (
        {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.4},
        "grpo",
        {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.4},
    ),
    "dr_grpo": (
        {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.1},
        "dr_grpo",
        {"max_completion_length": MAX_LENGTH, "beta": 0.1},
    ),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, "dapo", {}),
    "bnpo": ({"loss_type": "bnpo", "beta": 0.1}, "bnpo", {"beta": 0.1}),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.2, "beta": 0.1}, "cispo", {"max_ratio": 1.2, "beta": 0.1}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.05},
        "gspo",
        {"epsilon": 0.02, "epsilon_high": 0.05},
    ),
    "temperature": ({"loss_type": "grpo", "temperature": 0.7}, "grpo", {"temperature": 0.7}),
    "token entropy": ({"loss_type": "dapo", "entropy_coef": 0.1}, "dapo", {"epsilon_high": 0.2, "entropy_coef": 0.1}),
}


class Samples:
    """Three prompts with four responses each, and log-probs near the policy's, as an old policy and a reference."""

    def __init__(self, temperature: float) -> None:
        generator = torch.Generator().manual_seed(0)

        def tokens(low: int, high: int) -> list[int]:
            length = int(torch.randint(low, high + 1, (), generator=generator))
            return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()

        self.prompts = [tokens(18, 25) for _ in REWARDS]
        self.responses = [tokens(1, MAX_LENGTH) for _ in range(REWARDS.numel())]
        self.model = kvpref.attach(tiny_model("llama"))
        self.lengths = list(map(len, self.responses))
        with torch.no_grad():
            now = kvpref.response_logps(self.model, self.batch(), head=kvpref.HeadOptions(temperature=temperature))
        # As TRL has them, from the same model; both clips are reached.
        self.old, self.reference = (
            now.token_logps + 0.3 * torch.randn(now.token_logps.shape, generator=generator) for _ in range(2)
        )

    def batch(self, old: torch.Tensor | None = None) -> kvpref.Batch:
        groups = []
        for index, (prompt, rewards) in enumerate(zip(self.prompts, REWARDS.tolist(), strict=True)):
            own = slice(4 * index, 4 * index + 4)
            sequences = [kvpref.Sequence.from_prompt_and_response(prompt, response) for response in self.responses[own]]
            columns = {} if old is None else {"old": [row.tolist() for row in old.split(self.lengths)[own]]}
            groups.append(kvpref.Group(sequences, scores=rewards, columns=columns))
        return kvpref.collate(groups)

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        return pad_sequence(list(values.split(self.lengths)), batch_first=True)

    def trl_inputs(self, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
        prompts = [torch.tensor(prompt) for prompt in self.prompts for _ in range(4)]
        responses = [torch.tensor(response) for response in self.responses]
        return {
            "prompt_ids": pad_sequence(prompts, batch_first=True, padding_side="left"),
            "prompt_mask": pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left"),
            "completion_ids": pad_sequence(responses, batch_first=True),
            "completion_mask": pad_sequence([torch.ones_like(r) for r in responses], batch_first=True),
            "advantages": advantages.flatten(),
            "old_per_token_logps": self.padded(self.old),
            "ref_per_token_logps": self.padded(self.reference),
            "old_logps": self.padded(self.old).sum(1),
            "num_items_in_batch": torch.tensor(sum(self.lengths)),
        }


def trl_trainer(trainer_class: Any, config_class: Any, output: Path, arguments: dict[str, Any]) -> Any:
    """TRL's trainer with the same weights; nothing is generated."""
    settings = {"num_generations": 4, "max_completion_length": MAX_LENGTH, "per_device_train_batch_size": 12}
    # A reference on disk for arguments with a KL term; its log-probs are given.
    trainer = trainer_class(
        model=trl_runs.save_model(output / "model"),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=trl_runs.make_args(config_class, output, **settings, **arguments),
        train_dataset=Dataset.from_list([{"prompt": "w3 w4"}] * 12),
        processing_class=trl_runs.make_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def kvpref_output(samples: Samples, loss: PreferenceLoss) -> tuple[kvpref.LossOutput, kvpref.Batch]:
    batch = samples.batch(samples.old)
    policy = kvpref.response_logps(samples.model, batch, head=loss.head)
    return loss(policy, policy._replace(token_logps=samples.reference), batch), batch


def assert_same(samples: Samples, output: kvpref.LossOutput, trainer: Any, loss: torch.Tensor) -> None:
    assert output.loss.item() == pytest.approx(loss.item(), abs=TOLERANCE)
    found, truth = gradients(samples.model, output.loss), gradients(trainer.model, loss)
    largest = max(gradient.abs().max() for gradient in truth.values())
    assert largest > 1e-3
    for name, gradient in truth.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=GRADIENT_TOLERANCE * float(largest))


def group_normalised(rewards: torch.Tensor, scale: str) -> torch.Tensor:
    """As in GRPOTrainer._generate_and_score_completions."""
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    return centred if scale == "none" else centred / (nanstd(rewards, dim=1)[:, None] + 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_it_is_trls_grpo(case: str, tmp_path: Path) -> None:
    arguments, name, settings = CASES[case]
    samples = Samples(arguments.get("temperature", 1.0))
    trainer = trl_trainer(trl.GRPOTrainer, trl.GRPOConfig, tmp_path, {"temperature": 1.0, **arguments})
    advantages = group_normalised(REWARDS, arguments.get("scale_rewards", "group"))
    truth = trainer._compute_loss(trainer.model, samples.trl_inputs(advantages))
    output, _ = kvpref_output(samples, make_loss(name, old="old", **settings))
    assert_same(samples, output, trainer, truth)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    # TRL logs means over tokens, kvpref over what the loss is a mean over.
    if name in ("dapo", "bnpo", "cispo", "gspo"):
        shared = [key for key in logged if key in output.metrics and not (name == "gspo" and key in ("kl", "entropy"))]
        assert len(shared) >= (2 if name == "cispo" else 3)
        for key in shared:
            assert output.metrics[key].item() == pytest.approx(logged[key], abs=TOLERANCE)


def test_a_clip_is_reached_on_both_sides() -> None:
    # Else equal losses would say nothing of it.
    samples = Samples(1.0)
    for name, settings in (("dapo", {}), ("gspo", {"epsilon": 0.02, "epsilon_high": 0.05})):
        metrics = kvpref_output(samples, make_loss(name, old="old", **settings))[0].metrics
        assert metrics["clip_ratio/low_mean"] > 0
        assert metrics["clip_ratio/high_mean"] > 0
    cispo = make_loss("cispo", old="old", max_ratio=1.2)
    assert kvpref_output(samples, cispo)[0].metrics["cispo_clip_ratio"] > 0


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """As in RLOOTrainer._generate_and_score_completions."""
    return rewards - (rewards.nansum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


KLS: dict[str, Callable[[Samples], torch.Tensor]] = {
    "plain": lambda samples: torch.zeros(REWARDS.shape),
    "with KL": lambda samples: samples.padded(samples.old - samples.reference).sum(1).view(REWARDS.shape),
}


@pytest.mark.parametrize(("case", "beta"), [("plain", 0.0), ("with KL", 0.2)])
def test_it_is_trls_rloo(case: str, beta: float, tmp_path: Path) -> None:
    samples = Samples(1.0)
    trainer = trl_trainer(trl.RLOOTrainer, trl.RLOOConfig, tmp_path, {"beta": beta, "temperature": 1.0, "epsilon": 0.5})
    advantages = leave_one_out(REWARDS - beta * KLS[case](samples))
    truth = trainer._compute_loss(trainer.model, samples.trl_inputs(advantages))
    output, _ = kvpref_output(samples, make_loss("rloo", old="old", beta=beta, epsilon=0.5))
    assert_same(samples, output, trainer, truth)
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        assert output.metrics[name].item() == pytest.approx(trainer._metrics["train"][name][-1], abs=TOLERANCE)

"""Objectives on pairs, with and without a reference, on a model: TRL's own losses, gradients and metrics."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs the extra kvpref[trl]")

import trl_objectives  # noqa: E402
import trl_runs  # noqa: E402
from tiny_models import VOCAB_SIZE  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402

import kvpref  # noqa: E402
from kvpref.losses import make_loss  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that its experimental part is experimental
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

NUM_PAIRS = 6
# TRL's likelihood is a mean over the tokens of the batch, kvpref's over responses: they agree at one length.
CHOSEN_TOKENS = 5
REWARD_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")

Case = tuple[dict[str, Any], str, dict[str, Any]]
"""Attributes of TRL's trainer; kvpref's name and settings."""


class Pairs:
    """Prompts with a chosen and a rejected response, as kvpref's batch and as TRL's inputs."""

    def __init__(self, *, max_prompt_tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def tokens(low: int, high: int) -> list[int]:
            length = int(torch.randint(low, high + 1, (), generator=generator))
            return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()

        self.prompts = [tokens(1, max_prompt_tokens) for _ in range(NUM_PAIRS)]
        self.chosen = [tokens(CHOSEN_TOKENS, CHOSEN_TOKENS) for _ in range(NUM_PAIRS)]
        self.rejected = [tokens(1, 9) for _ in range(NUM_PAIRS)]

    def batch(self) -> kvpref.Batch:
        """The chosen response second in every other group."""
        groups = []
        for index, rows in enumerate(zip(self.prompts, self.chosen, self.rejected, strict=True)):
            sequences = [kvpref.Sequence.from_prompt_and_response(rows[0], response) for response in rows[1:]]
            order = (1, 0) if index % 2 else (0, 1)
            groups.append(kvpref.Group(sequences, labels=[True, False]).take(order))
        return kvpref.collate(groups, min_shared_tokens=1)

    def dpo_inputs(self, collator: Any) -> dict[str, torch.Tensor]:
        rows = zip(self.prompts, self.chosen, self.rejected, strict=True)
        return collator([{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in rows])

    def cpo_inputs(self) -> dict[str, torch.Tensor]:
        inputs = {}
        for kind, responses in (("chosen", self.chosen), ("rejected", self.rejected)):
            ids = [torch.tensor(p + r) for p, r in zip(self.prompts, responses, strict=True)]
            labels = [torch.tensor([-100] * len(p) + r) for p, r in zip(self.prompts, responses, strict=True)]
            inputs[f"{kind}_input_ids"] = pad_sequence(ids, batch_first=True)
            inputs[f"{kind}_attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
            inputs[f"{kind}_labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
        return inputs

    def run_kvpref(self, name: str, settings: dict[str, Any]) -> trl_objectives.Result:
        models = trl_objectives.policy_model(), trl_objectives.reference_model()
        return trl_objectives.run_kvpref(make_loss(name, **settings), self.batch(), *models)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return Pairs(max_prompt_tokens=12)


def make_trainer(trainer_class: Any, config_class: Any, output: Path, options: dict[str, Any], **models: Any) -> Any:
    return trainer_class(
        model=trl_objectives.policy_model(),
        args=trl_runs.make_args(config_class, output, gradient_checkpointing=False, **options),
        train_dataset=trl_runs.pairs(4),
        processing_class=trl_runs.make_tokenizer(),
        **models,
    )


def set_attributes(trainer: Any, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(trainer, name, value)


# With a reference

DPO_ATTRIBUTES: dict[str, Any] = {
    "beta": 0.3,
    "loss_weights": [1.0],
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
}
# TRL's names and kvpref's.
MARGIN_LOSSES = {
    "sigmoid": "dpo",
    "sigmoid_norm": "sigmoid_norm",
    "hinge": "hinge",
    "ipo": "ipo",
    "exo_pair": "exo",
    "robust": "robust",
    "discopop": "discopop",
}
RATIO_LOSSES = {
    "nca_pair": "nca",
    "bco_pair": "bco",
    "sppo_hard": "sppo",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
}
SORTED_LOSSES = {"aot": "aot", "aot_unpaired": "aot_unpaired"}
DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")


def dpo_cases() -> dict[str, Case]:
    """Every loss with every option that TRL admits for it."""
    cases: dict[str, Case] = {}
    for theirs, ours in {**MARGIN_LOSSES, **RATIO_LOSSES, **SORTED_LOSSES}.items():
        options: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "": ({}, {}),
            ", LD-DPO": ({"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
        }
        if theirs not in SORTED_LOSSES:
            options[", WPO"] = ({"use_weighting": True}, {"weighting": True})
        if theirs in MARGIN_LOSSES:
            for their_kind, our_kind in DIVERGENCES.items():
                options[f", {our_kind}"] = ({"f_divergence_type": their_kind}, {"divergence": our_kind})
        smoothing = {"label_smoothing": 0.1} if theirs in SMOOTHED else {}
        for label, (attributes, settings) in options.items():
            cases[theirs + label] = (
                {"loss_types": [theirs], **smoothing, **attributes},
                ours,
                {"beta": 0.3, **smoothing, **settings},
            )
    return cases


DPO_CASES: dict[str, Case] = {
    **dpo_cases(),
    "sigmoid, alpha 1": (
        {"loss_types": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        "dpo",
        {"beta": 0.3, "divergence": "alpha", "divergence_alpha": 1.0},
    ),
    "MPO": (
        {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        "mpo",
        {"settings": {"dpo": {"beta": 0.3}, "bco": {"beta": 0.3}}},
    ),
    "RPO": (
        {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
        "rpo",
        {"alpha": 0.7, "settings": {"dpo": {"beta": 0.3}}},
    ),
    "mixture": (
        {"loss_types": ["ipo", "sppo_hard"], "loss_weights": [0.5, 0.1]},
        "mixture",
        {"weights": {"ipo": 0.5, "sppo": 0.1}, "settings": {"ipo": {"beta": 0.3}, "sppo": {"beta": 0.3}}},
    ),
}


@pytest.fixture(scope="module")
def dpo_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    # Made with weighting, TRL's head computes what any loss type may need.
    options = {"use_weighting": True}
    models = {"ref_model": trl_objectives.reference_model()}
    return make_trainer(trl.DPOTrainer, trl.DPOConfig, tmp_path_factory.mktemp("dpo"), options, **models)


@pytest.mark.parametrize("case", DPO_CASES.values(), ids=DPO_CASES)
def test_objectives_with_a_reference_are_trls(dpo_trainer: Any, pairs: Pairs, case: Case) -> None:
    attributes, name, settings = case
    set_attributes(dpo_trainer, {**DPO_ATTRIBUTES, **attributes})
    loss = dpo_trainer._compute_loss(dpo_trainer.model, pairs.dpo_inputs(dpo_trainer.data_collator), False)
    # TRL multiplies the weights into the output of its relu in place, and cannot go back through it.
    differentiates = not (dpo_trainer.use_weighting and name == "hinge")
    metrics = dpo_trainer._metrics["train"]
    truth = trl_objectives.run_trl(loss, metrics, dpo_trainer.model, differentiates=differentiates)
    is_steep = name == "discopop"
    tolerance = trl_objectives.STEEP_GRADIENT_TOLERANCE if is_steep else trl_objectives.GRADIENT_TOLERANCE
    found = pairs.run_kvpref(name, settings)
    trl_objectives.assert_same(found, truth, (*REWARD_METRICS, "logps/chosen"), tolerance)


# Without a reference

CPO_ATTRIBUTES = {"beta": 0.7, "cpo_alpha": 0.0, "simpo_gamma": 0.5, "alpha": 0.0, "label_smoothing": 0.0}
CPO_CASES: dict[str, Case] = {
    "simpo": ({"loss_type": "simpo"}, "simpo", {}),
    "simpo, smoothed": ({"loss_type": "simpo", "label_smoothing": 0.1}, "simpo", {"label_smoothing": 0.1}),
    "alphapo": ({"loss_type": "simpo", "alpha": 0.25}, "alphapo", {"gamma": 0.5}),
    "cpo": ({"loss_type": "sigmoid", "cpo_alpha": 0.8}, "cpo", {"cpo_alpha": 0.8}),
    "cpo, smoothed": (
        {"loss_type": "sigmoid", "cpo_alpha": 1.0, "label_smoothing": 0.1},
        "cpo",
        {"label_smoothing": 0.1},
    ),
    "cpo, hinge": ({"loss_type": "hinge"}, "cpo", {"form": "hinge", "cpo_alpha": 0}),
}


@pytest.fixture(scope="module")
def cpo_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_trainer(CPOTrainer, CPOConfig, tmp_path_factory.mktemp("cpo"), {})


@pytest.mark.parametrize("case", CPO_CASES.values(), ids=CPO_CASES)
def test_objectives_without_a_reference_are_trls(cpo_trainer: Any, pairs: Pairs, case: Case) -> None:
    attributes, name, settings = case
    set_attributes(cpo_trainer, {**CPO_ATTRIBUTES, **attributes})
    loss, metrics = cpo_trainer.get_batch_loss_metrics(cpo_trainer.model, pairs.cpo_inputs())
    truth = trl_objectives.run_trl(loss, metrics, cpo_trainer.model)
    trl_objectives.assert_same(pairs.run_kvpref(name, {"beta": 0.7, **settings}), truth, REWARD_METRICS)


def test_orpo_is_trls(tmp_path: Path) -> None:
    # Prompts of one token: TRL's likelihood runs over the prompt too, of which the first token has none.
    pairs = Pairs(max_prompt_tokens=1)
    trainer = make_trainer(ORPOTrainer, ORPOConfig, tmp_path, {"beta": 0.7})
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, pairs.cpo_inputs())
    truth = trl_objectives.run_trl(loss, metrics, trainer.model)
    found = pairs.run_kvpref("orpo", {"beta": 0.7})
    trl_objectives.assert_same(found, truth, REWARD_METRICS)
    assert found.metrics["nll_per_token"] == pytest.approx(metrics["nll_loss"], rel=trl_objectives.LOSS_TOLERANCE)

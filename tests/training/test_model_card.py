"""Model cards: what stands in them, and that nobody's own card is overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from kvpref.losses import LOSSES, as_loss
from kvpref.training.card_facts import _papers
from kvpref.training.model_card import CardFacts, card_text, hub_name, papers_of, public_name, write_card


def make_facts(**changes: Any) -> CardFacts:
    facts: dict[str, Any] = {
        "title": "tuned",
        "base_model": "someone/base",
        "datasets": ("someone/pairs:train", "/secret/place/pairs.jsonl"),
        "library": "transformers",
        "task": "text-generation",
        "tags": ("kvpref", "dpo"),
        "summary": "A summary.",
        "training": {"loss": "dpo with beta=0.1 | more", "steps": "3"},
        "evaluation": {"rewards/accuracies": 0.75},
        "versions": {"kvpref": "0"},
        "papers": (("Rafailov et al. 2023", "2305.18290"),),
        "metadata": {},
        **changes,
    }
    return CardFacts(**facts)


def test_the_hub_reads_its_head(tmp_path: Path) -> None:
    assert write_card(tmp_path, make_facts())
    card = ModelCard.load(tmp_path / "README.md")
    head = card.data.to_dict()
    assert head == {
        "base_model": "someone/base",
        "datasets": ["someone/pairs"],
        "library_name": "transformers",
        "model_name": "tuned",
        "pipeline_tag": "text-generation",
        "tags": ["kvpref", "dpo"],
    }
    assert "| loss | dpo with beta=0.1 \\| more |" in card.text
    assert "| rewards/accuracies | 0.75 |" in card.text
    assert "Rafailov et al. 2023, [arXiv 2305.18290](https://arxiv.org/abs/2305.18290)" in card.text
    assert "/secret" not in card.content
    assert "License: none is stated" in card.text


def test_a_license_is_the_users() -> None:
    text = card_text(make_facts(metadata={"license": "mit"}))
    assert "\nlicense: mit\n" in text
    assert "License: none" not in text


def test_a_card_of_its_own_is_written_anew_and_any_other_is_left(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert write_card(tmp_path, make_facts())
    assert write_card(tmp_path, make_facts(title="anew"))
    text = card.read_text()
    assert "# anew" in text
    for edited in (
        text.replace("# anew", "# mine"),
        text + "more\n",
        text.replace("---\n", "---\nlicense: mit\n", 1),
        "",
    ):
        card.write_text(edited)
        assert not write_card(tmp_path, make_facts())
        assert card.read_text() == edited


def test_names_of_the_hub_and_of_this_machine(tmp_path: Path) -> None:
    assert hub_name("someone/pairs:train[:100]") == "someone/pairs"
    for local in (str(tmp_path), "pairs.jsonl", "/gone/model", "a/b/c", None):
        assert hub_name(local) is None
    assert public_name("/gone/model") == "model"
    assert public_name("someone/model") == "someone/model"


def test_papers_are_found_in_docstrings() -> None:
    text = "Equation 2 of Liu et al.\n 2024 (Tulu, arXiv 2401.00001), with that of Shao and Li 2023 (arXiv 2302.00002)."
    assert papers_of(text, text) == (("Liu et al. 2024", "2401.00001"), ("Shao and Li 2023", "2302.00002"))


def test_the_papers_of_settings_count_only_where_they_are_used() -> None:
    first = ("Rafailov et al. 2023", "2305.18290")
    assert _papers(LOSSES["dpo"]()) == (first,)
    assert _papers(LOSSES["dpo"](ld_alpha=0.5)) == (first, ("Liu et al. 2024", "2409.06411"))


def test_the_papers_of_a_mixture_and_of_a_function() -> None:
    def mine(policy: Any, reference: Any, batch: Any) -> None:
        """After Someone and Other 2025 (arXiv 2501.00001)."""

    mixed = LOSSES["mixture"](weights={"dpo": 1.0, "simpo": 0.5})
    assert {number for _, number in _papers(mixed)} >= {"2305.18290", "2405.14734"}
    assert _papers(as_loss(mine)) == (("Someone and Other 2025", "2501.00001"),)


@pytest.mark.parametrize("name", ["dpo", "bradley_terry", "kto", "grpo", "simpo", "orpo", "plackett_luce"])
def test_common_losses_name_a_paper(name: str) -> None:
    assert _papers(LOSSES[name]())

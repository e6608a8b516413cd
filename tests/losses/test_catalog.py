"""Descriptions of losses, read from their code."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

import kvpref
from kvpref.losses import LOSSES, PreferenceLoss
from kvpref.losses.catalog import VARIES, Setting, describe_loss


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_registered_loss_explains_itself(name: str) -> None:
    found = describe_loss(name, LOSSES[name])
    assert found.summary.endswith((".", ":"))
    assert found.unit
    assert all(setting.explanation for setting in found.settings)


def test_settings_of_a_class_with_their_explanations() -> None:
    found = describe_loss("dpo", LOSSES["dpo"])
    settings = {setting.name: setting for setting in found.settings}
    assert settings["beta"] == Setting(
        name="beta",
        default=0.1,
        required=False,
        explanation="Strength of the pull towards the reference; the larger, the closer.",
    )
    assert (found.unit, found.needs_reference, found.reads) == ("groups", True, "tokens")
    assert "arXiv 2305.18290" in found.explanation


def test_what_depends_on_required_settings_is_not_guessed() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mixture(PreferenceLoss):
        """Several.

        More.
        """

        parts: dict[str, float]
        """Weights
        by name."""

        names: list[str] = field(default_factory=lambda: ["a"])

        @property
        def needs_reference(self) -> bool:  # type: ignore[override]
            return bool(self.parts)

    found = describe_loss("mixture", Mixture)
    assert found.summary == "Several."
    assert found.needs_reference == VARIES
    assert found.settings == (
        Setting(name="parts", default=None, required=True, explanation="Weights by name."),
        Setting(name="names", default=["a"], required=False, explanation=""),
    )


def test_a_function() -> None:
    @kvpref.loss(needs_reference=True, reads="tokens")
    def mine(policy: object, reference: object, batch: object, *, beta: float = 0.5) -> None:
        """Mine."""

    found = describe_loss("mine.py:mine", mine)
    assert (found.summary, found.unit, found.needs_reference) == ("Mine.", "groups", True)
    assert found.settings == (Setting(name="beta", default=0.5, required=False, explanation=""),)


def test_what_is_no_loss_is_refused() -> None:
    with pytest.raises(kvpref.InputError, match="3 is not a loss"):
        describe_loss("number", 3)

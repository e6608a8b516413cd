"""What is advised in place of names from elsewhere exists."""

from __future__ import annotations

from kvpref.cli.declared_names import training_arguments
from kvpref.cli.given_settings import OWN_NAMES
from kvpref.cli.other_names import INSTEAD, SAME, WITHOUT_EFFECT, setting_name

SETTINGS = {*OWN_NAMES, *training_arguments(), "overwrite"}


def test_settings_under_other_names_exist() -> None:
    assert set(SAME.values()) <= SETTINGS
    assert {instead for instead, _ in INSTEAD.values()} <= SETTINGS
    assert not set(SAME) & set(OWN_NAMES)
    assert WITHOUT_EFFECT.keys() <= training_arguments().keys()


def test_hyphens_and_names_of_trl_are_read() -> None:
    assert setting_name("max-steps") == "max_steps"
    assert setting_name("model-name-or-path") == setting_name("model_name_or_path") == "model"
    assert setting_name("epochs") == "num_train_epochs"

"""Whether a run can push is asked before it starts."""

from __future__ import annotations

from typing import Any

import huggingface_hub
import pytest

from kvpref import InputError
from kvpref.training.hub import check_hub


def test_the_account_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "whoami", lambda token: {"name": f"owner of {token}"})
    assert check_hub("hf_mine") == "owner of hf_mine"


def test_no_token_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(token: Any) -> None:
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required\nand more lines")

    monkeypatch.setattr(huggingface_hub, "whoami", refuse)
    with pytest.raises(InputError, match=r"^--push-to-hub: .*: Token is required; log in with `hf auth login`"):
        check_hub(None, "--push-to-hub")

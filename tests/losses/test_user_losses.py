"""Losses from files, modules and entry points: what they may look like, their settings, and every way to fail."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

import kvpref
from kvpref.losses import as_loss, loss_name, make_loss, user
from kvpref.losses.interface import FunctionLoss

SOURCE = '''
"""Losses of a user."""
from __future__ import annotations

import dataclasses

import kvpref
import neighbour
from kvpref.losses import PreferenceLoss


@kvpref.loss(needs_reference=True, columns=["weight"], entropy=True)
def margin(policy, reference, batch, *, beta=0.1, offset=0.0):
    """A margin."""
    return kvpref.LossOutput(beta * policy.sum().mean() + offset, {})


def bare(policy, reference, batch, scale=1.0):
    return scale * policy.sum().mean()


def required(policy, reference, batch, *, beta):
    return beta * policy.sum().mean()


def anything(policy, reference, batch, **settings):
    return settings["scale"] * policy.sum().mean()


def too_few(policy, reference):
    return policy.sum().mean()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge(PreferenceLoss):
    """A loss whose needs depend on its settings."""

    token: int
    beta: float = neighbour.BETA

    def __post_init__(self):
        if self.beta <= 0:
            raise kvpref.InputError("beta must be positive")

    @property
    def head(self):
        return kvpref.HeadOptions(logit_ids=(self.token,))

    def __call__(self, policy, reference, batch):
        return kvpref.LossOutput(-self.beta * policy.logits.mean(), {})


made = Judge(token=3)
number = 3
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before = set(sys.modules)
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "neighbour.py").write_text("BETA = 0.5\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def make_inputs() -> tuple[kvpref.ResponseLogps, kvpref.Batch]:
    sequences = [kvpref.Sequence.from_prompt_and_response([1, 2], [3, 4]) for _ in range(2)]
    batch = kvpref.collate([kvpref.Group(sequences, labels=[True, False])])
    token_logps = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64, requires_grad=True)
    return kvpref.ResponseLogps(token_logps, batch.cu_seqlens, batch.group_index), batch


def test_a_function_keeps_its_name_and_needs_whatever_its_settings(folder: Path) -> None:
    policy, batch = make_inputs()
    for settings, expected in (({}, 0.1 * -5), ({"beta": 2, "offset": 1.0}, 2 * -5 + 1.0)):
        loss = make_loss("mine.py:margin", **settings)
        assert loss(policy, None, batch).loss.item() == pytest.approx(expected)
        assert (loss.__name__, loss.needs_reference, loss.columns) == ("margin", True, ("weight",))
        assert (loss.reads, loss.head) == ("tokens", kvpref.HeadOptions(entropy=True))
    assert str(make_loss(f"{folder}/mine.py:margin").__name__) == "margin"


def test_settings_given_by_hand_leave_what_a_function_declares(folder: Path) -> None:
    policy, batch = make_inputs()
    loss = make_loss("mine.py:margin")
    assert isinstance(loss, FunctionLoss)
    by_hand = as_loss(partial(partial(loss.function, beta=3.0), offset=1.0))
    assert by_hand(policy, None, batch).loss.item() == pytest.approx(3 * -5 + 1.0)
    assert (by_hand.needs_reference, by_hand.columns, by_hand.head) == (True, ("weight",), loss.head)
    assert loss_name(by_hand) == "margin"


def test_a_scalar_alone_is_a_loss_without_metrics(folder: Path) -> None:
    policy, batch = make_inputs()
    output = make_loss("mine.py:bare", scale=3.0)(policy, None, batch)
    assert output.loss.item() == pytest.approx(-15)
    assert output.metrics == {}
    assert make_loss("mine.py:anything", scale=2.0)(policy, None, batch).loss.item() == pytest.approx(-10)


def test_a_class_is_made_with_its_settings(folder: Path) -> None:
    loss = make_loss("mine.py:Judge", token=7)
    assert loss.head == kvpref.HeadOptions(logit_ids=(7,))
    assert loss.beta == 0.5  # type: ignore[attr-defined]
    assert make_loss("mine.py:made").head == kvpref.HeadOptions(logit_ids=(3,))


def test_a_file_runs_once_until_it_changes(folder: Path) -> None:
    (folder / "counted.py").write_text("import neighbour\nneighbour.BETA += 1\ndef f(p, r, b): return p.sum().mean()\n")
    make_loss("counted.py:f")
    make_loss("counted.py:f")
    assert sys.modules["neighbour"].BETA == 1.5  # type: ignore[attr-defined]
    (folder / "counted.py").write_text("def f(p, r, b): return 2 * p.sum().mean()\n")
    policy, batch = make_inputs()
    assert make_loss("counted.py:f")(policy, None, batch).loss.item() == pytest.approx(-10)


def test_a_module_of_the_current_folder(folder: Path) -> None:
    (folder / "team").mkdir()
    (folder / "team" / "__init__.py").touch()
    (folder / "team" / "losses.py").write_text("def f(p, r, b, *, scale=1.0): return scale * p.sum().mean()\n")
    policy, batch = make_inputs()
    assert make_loss("team.losses:f", scale=4.0)(policy, None, batch).loss.item() == pytest.approx(-20)
    assert str(folder) not in sys.path


def test_an_entry_point_adds_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "plugin_losses.py").write_text("def f(p, r, b, *, scale=1.0): return scale * p.sum().mean()\n")
    monkeypatch.syspath_prepend(str(folder))
    points = {"mean_sum": EntryPoint("mean_sum", "plugin_losses:f", user.ENTRY_POINT_GROUP)}
    monkeypatch.setattr(user, "installed_losses", lambda: points)
    policy, batch = make_inputs()
    assert make_loss("mean_sum", scale=2.0)(policy, None, batch).loss.item() == pytest.approx(-10)
    with pytest.raises(kvpref.InputError, match=r"unknown loss 'nope'; choose from: dpo, .*mean_sum; or .*FILE\.py"):
        make_loss("nope")


def test_an_installed_package_is_found_by_its_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvpref.losses]\nmy_margin = plugin_code:f\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert user.installed_losses()["my_margin"].value == "plugin_code:f"


BAD_NAMES = {
    "no file": ("nowhere.py:f", {}, r"nowhere\.py: cannot read the file of the loss \(No such file"),
    "no function": ("mine.py:marign", {}, r"mine\.py has no 'marign'; it defines: margin, bare, .*Judge"),
    "no name": ("mine.py", {}, r"loss 'mine\.py': expected FILE\.py:FUNCTION"),
    "empty name": ("mine.py:", {}, r"expected FILE\.py:FUNCTION"),
    "no module": ("nowhere.losses:f", {}, r"there is no module 'nowhere'; give FILE\.py:FUNCTION"),
    "unknown setting": ("mine.py:margin", {"gamma": 1}, r"has no setting 'gamma'; it has: beta, offset$"),
    "class setting": ("mine.py:Judge", {"token": 1, "gamma": 1}, r"no setting 'gamma'; it has: token, beta$"),
    "missing setting": ("mine.py:required", {}, r"'mine\.py:required' needs the setting 'beta'"),
    "missing field": ("mine.py:Judge", {}, r"'mine\.py:Judge' needs the setting 'token'"),
    "refused setting": ("mine.py:Judge", {"token": 1, "beta": -1}, "^beta must be positive"),
    "setting's type": ("mine.py:Judge", {"token": 1, "beta": "x"}, r"cannot be made with token=1, beta='x': '<='"),
    "settings of an object": ("mine.py:made", {"beta": 1}, "is already made and takes no settings; found beta"),
    "not a loss": ("mine.py:number", {}, "is a int; expected a function"),
    "another class": ("mine.py:dataclasses", {}, "is a module; expected a function"),
    "arguments": ("mine.py:too_few", {}, r"must take \(policy, reference, batch\).*too many positional"),
}


@pytest.mark.parametrize(("name", "settings", "message"), BAD_NAMES.values(), ids=BAD_NAMES.keys())
def test_bad_names_and_settings(folder: Path, name: str, settings: dict, message: str) -> None:
    with pytest.raises(kvpref.InputError, match=message) as caught:
        make_loss(name, **settings)
    assert "\n" not in str(caught.value)


BAD_CODE = {
    "syntax": ("def f(:\n    pass\n", r"broken\.py:1: SyntaxError: "),
    "import": ("\nimport no_such_package\n", r"broken\.py:2: ModuleNotFoundError: No module named 'no_such_package'"),
    "raises": ("import torch\n\ntorch.zeros(2) @ torch.zeros(3)\n", r"broken\.py:3: RuntimeError: "),
    "in a library": ("import json\njson.loads('{')\n", r"broken\.py:2: JSONDecodeError: "),
    "in a neighbour": ("import bad_neighbour\n", r"bad_neighbour\.py:2: NameError: name 'x' is not defined"),
    "declaration": ("import kvpref\n@kvpref.loss(entropi=True)\ndef f(): ...\n", r"broken\.py:2: kvpref\.loss has no "),
    "columns": ("import kvpref\n@kvpref.loss(columns='weight')\ndef f(): ...\n", r"broken\.py:2: columns must be"),
    "exits": ("raise SystemExit(3)\n", r"broken\.py:1: SystemExit: 3"),
}


@pytest.mark.parametrize(("code", "message"), BAD_CODE.values(), ids=BAD_CODE.keys())
@pytest.mark.parametrize("name", ["broken.py:f", "broken:f"])
def test_code_that_cannot_be_imported_is_named_with_its_line(folder: Path, code: str, message: str, name: str) -> None:
    (folder / "broken.py").write_text(code)
    (folder / "bad_neighbour.py").write_text("\nx + 1\n")
    with pytest.raises(kvpref.InputError, match=message) as caught:
        make_loss(name)
    assert "\n" not in str(caught.value)
    assert not any(module.startswith("kvpref_loss_broken") for module in sys.modules)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("columns", "weight", "columns must be a list of names; got 'weight'"),
        ("reads", "rewards", "unknown reads 'rewards'; choose from: tokens, ends"),
        ("head", {"entropy": True}, "loss 'f': head must be a kvpref.HeadOptions"),
    ],
)
def test_declarations_by_hand_are_checked(attribute: str, value: object, message: str) -> None:
    def f(policy: object, reference: object, batch: object) -> None: ...

    setattr(f, attribute, value)
    with pytest.raises(kvpref.InputError, match=message):
        as_loss(f)

"""`kvpref train --push-to-hub`, with a hub that is made up: what is uploaded, and the card in it."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from command_line_in_process import fail, run
from huggingface_hub import ModelCard, RepoUrl
from huggingface_hub.utils import filter_repo_objects

STEPS = ["--max-steps", 2, "--batch-size", 4, "--learning-rate", 1e-2, "--set", "use_cpu=true"]
OF_THE_RUN = ("reference", "checkpoint-", "run.yaml", "resume", "result", "trainer_state", "training_args")


class MadeUpHub:
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        self.repos: list[dict[str, Any]] = []
        self.uploads: list[dict[str, Any]] = []

    def create_repo(self, api: Any, repo_id: str, **settings: Any) -> RepoUrl:
        self.repos.append({"repo_id": repo_id, **settings})
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'me/{repo_id}'}")

    def upload_folder(self, **settings: Any) -> Any:
        folder = Path(settings["folder_path"])
        paths = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        kept = set(filter_repo_objects(paths, ignore_patterns=settings.get("ignore_patterns")))
        texts = {name: (folder / name).read_text() for name in kept if name.endswith(".md")}
        self.uploads.append({**settings, "files": kept, "texts": texts})
        done: Future[None] = Future()
        done.set_result(None)
        return done


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> MadeUpHub:
    made_up = MadeUpHub()
    monkeypatch.setattr(huggingface_hub, "whoami", lambda token=None: {"name": "me"})
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda api, *a, **s: made_up.create_repo(api, *a, **s))
    monkeypatch.setattr(huggingface_hub, "upload_folder", made_up.upload_folder)
    return made_up


@pytest.mark.parametrize(
    ("options", "library", "task", "tags", "weights"),
    [
        ([], "transformers", "text-generation", {"kvpref", "dpo"}, "model.safetensors"),
        (["--lora-r", 4], "peft", "text-generation", {"kvpref", "dpo", "lora"}, "adapter_model.safetensors"),
        (
            ["--loss", "bradley_terry"],
            "transformers",
            "text-classification",
            {"kvpref", "bradley_terry", "reward-model"},
            "model.safetensors",
        ),
    ],
    ids=["all weights", "lora", "reward model"],
)
def test_the_final_model_is_pushed_with_its_card(
    options: list[object],
    library: str,
    task: str,
    tags: set[str],
    weights: str,
    trained_dir: Path,
    pairs_file: Path,
    tmp_path: Path,
    hub: MadeUpHub,
) -> None:
    if library == "peft":
        pytest.importorskip("peft", reason="needs the extra kvpref[peft]")
    output = tmp_path / "out"
    run(
        *("train", trained_dir, pairs_file, "--output", output, "--eval-data", pairs_file, *options, *STEPS),
        *("--push-to-hub", "--hub-model-id", "me/tuned", "--hub-private-repo", "--set", "hub_strategy=end"),
    )
    (repo,) = hub.repos
    assert (repo["repo_id"], repo["private"]) == ("me/tuned", True)
    (upload,) = hub.uploads  # once, with the evaluation
    assert upload["repo_id"] == "me/tuned"
    assert {weights, "README.md", "tokenizer.json", "metrics.jsonl"} <= upload["files"]
    assert not any(name.startswith(OF_THE_RUN) for name in upload["files"])
    card = ModelCard(upload["texts"]["README.md"])
    head = card.data.to_dict()
    assert (head["library_name"], head["pipeline_tag"], set(head["tags"])) == (library, task, tags)
    assert head["model_name"] == "tuned"
    assert "license" not in head
    for text in ("pairs.jsonl: 24 groups, 48 responses; fingerprint", "| base model | model |", "two_pass, full"):
        assert text in card.text
    for text in ("| steps | 2 of 4 groups", "x: tokens of all sequences per token", "arXiv", "| transformers |"):
        assert text in card.text
    assert ("on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj |" in card.text) == (library == "peft")
    assert ("| accuracy |" if "--loss" in options else "| rewards/accuracies |") in card.text
    assert str(tmp_path) not in card.content
    assert str(trained_dir) not in card.content
    saved = yaml.safe_load((output / "run.yaml").read_text())["training"]
    assert (saved["push_to_hub"], saved["hub_model_id"], saved["hub_private_repo"]) == (True, "me/tuned", True)


def test_a_card_that_was_edited_stays(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "README.md").write_text("# Mine\n")
    lora = ["--lora-r", 2]  # peft writes a card of its own
    run("train", trained_dir, pairs_file, "--output", output, "--eval-data", pairs_file, *lora, *STEPS)
    assert (output / "README.md").read_text() == "# Mine\n"
    assert capsys.readouterr().err.count("README.md is not as kvpref wrote it, and is left as it is") == 1


@pytest.mark.full
def test_checkpoints_are_pushed_without_what_only_the_run_needs(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, hub: MadeUpHub
) -> None:
    """hub_strategy is every_save, as in transformers."""
    output = tmp_path / "out"
    run("train", trained_dir, pairs_file, "--output", output, *STEPS, "--save-steps", 1, "--push-to-hub")
    first, second, last = hub.uploads
    assert first["repo_id"] == "me/out"
    assert [item["commit_message"] for item in (first, second, last)] == [
        "Training in progress, step 1",
        "Training in progress, step 2",
        "End of training",
    ]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= first["files"]
    assert not any(name.startswith(OF_THE_RUN) for name in first["files"])


def test_no_login_is_one_error_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(token: Any = None) -> None:
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required, but no token found")

    monkeypatch.setattr(huggingface_hub, "whoami", refuse)
    error = fail(
        capsys,
        *("train", "org/model", "org/data", "--output", tmp_path / "out", "--set", "use_cpu=true"),
        "--push-to-hub",
    )
    assert "--push-to-hub: the hub does not take this login: Token is required, but no token found; log in" in error
    assert not (tmp_path / "out").exists()


def test_a_failed_upload_says_where_the_model_is(
    trained_dir: Path,
    pairs_file: Path,
    tmp_path: Path,
    hub: MadeUpHub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail_to_upload(**settings: Any) -> None:
        raise ConnectionError("the line is down")

    monkeypatch.setattr(huggingface_hub, "upload_folder", fail_to_upload)
    output = tmp_path / "out"
    arguments = (
        "train",
        trained_dir,
        pairs_file,
        "--output",
        output,
        *STEPS,
        "--push-to-hub",
        "--set",
        "hub_strategy=end",
    )
    error = fail(capsys, *arguments, code=1)
    assert f"cannot push to me/out: the line is down; the model is saved in {output}" in error
    monkeypatch.setattr(huggingface_hub, "upload_folder", hub.upload_folder)
    run(*arguments, "--resume")
    assert len(hub.uploads) == 1

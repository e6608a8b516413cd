"""Figures about data and batches, and the command that prints them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from group_lengths import make_lengths
from typer.testing import CliRunner

from kvpref.cli import data as data_command
from kvpref.data import CostModel, PreferenceDataset, StepBatcher, StepOptions, summarize_batches, summarize_dataset
from kvpref.data.statistics import DATA_SAVING, TOKEN_SAVING
from kvpref.data.summaries import LengthSummary
from kvpref.errors import InputError
from kvpref.records.groups import Group, Sequence
from kvpref.records.images import Image, PlacedImage


def make_group(prompt: int, *responses: int) -> Group:
    return Group(
        [
            Sequence.from_prompt_and_response(range(prompt), range(100 * (index + 1), 100 * (index + 1) + length))
            for index, length in enumerate(responses)
        ]
    )


def test_dataset_figures():
    statistics = summarize_dataset(PreferenceDataset([make_group(10, 2, 4), make_group(20, 1, 1, 4)]))
    total = 12 + 14 + 21 + 21 + 24
    assert (statistics.num_groups, statistics.num_sequences) == (2, 5)
    assert statistics.sequences_per_group == LengthSummary(mean=2.5, p50=2, p90=3, max=3)
    assert statistics.prompt_tokens == LengthSummary(mean=15.0, p50=10, p90=20, max=20)
    assert statistics.response_tokens == LengthSummary(mean=12 / 5, p50=2, p90=4, max=4)
    assert statistics.prompt_share == pytest.approx((20 + 60) / total)
    assert (statistics.total_tokens, statistics.unique_tokens) == (total, 10 + 6 + 20 + 6)
    assert statistics.prompt_saving == statistics.prefix_saving == pytest.approx(total / 42)


def test_shared_response_starts_count_in_the_prefix_saving_only():
    group = Group([Sequence.from_prompt_and_response([1, 2], [3, end]) for end in (4, 5)])
    statistics = summarize_dataset(PreferenceDataset([group]))
    assert statistics.prompt_saving == pytest.approx(8 / 6)
    assert statistics.prefix_saving == pytest.approx(8 / 5)


def test_prompts_of_unequal_length_count_as_the_shortest():
    group = Group([Sequence([1, 2, 3, 4], [False, False, False, True]), Sequence([1, 2, 5], [False, False, True])])
    statistics = summarize_dataset(PreferenceDataset([group]))
    assert statistics.prompt_tokens.mean == 2
    assert statistics.prompt_share == pytest.approx(5 / 7)
    assert statistics.prompt_saving == pytest.approx(7 / 5)


def test_batch_figures():
    dataset = PreferenceDataset([make_group(10, 2, 4), make_group(20, 1, 1, 4), make_group(1, 1)])
    options = StepOptions(
        groups_per_step=2, mode="padded", max_tokens_per_micro_batch=80, shuffle=False, window_steps=9
    )
    batches = summarize_batches(StepBatcher(dataset.lengths, options))
    # Costs 2 x 14, 3 x 24 and 1 x 2; the first two are too much together.
    assert (batches.num_steps, batches.num_micro_batches, batches.num_fillers) == (2, 3, 0)
    assert batches.micro_batches_per_step == 1.5
    assert batches.tokens_per_micro_batch.max == 72
    assert batches.tokens_per_micro_batch.mean == pytest.approx(34)
    assert batches.budget_fill == pytest.approx(34 / 80)
    assert batches.padding_share == pytest.approx(((28 - 26) + (72 - 66)) / 102)


def test_batch_figures_without_budget_or_padding_and_with_fillers():
    dataset = PreferenceDataset([make_group(10, 2, 4)])
    batches = summarize_batches(StepBatcher(dataset.lengths, StepOptions(groups_per_step=2, world_size=3)))
    assert (batches.num_micro_batches, batches.num_fillers) == (1, 2)
    assert batches.budget_fill is None
    assert batches.padding_share == 0


def test_imbalance_and_step_costs_by_hand():
    options = StepOptions(groups_per_step=3, world_size=2, shuffle=False)
    batcher = StepBatcher([make_lengths([length]) for length in (1, 2, 4)], options)
    # The step's best cut is 4 against 2 and 1.
    batches = summarize_batches(batcher)
    assert (batches.world_size, batches.cost_unit) == (2, "tokens")
    assert batches.imbalance == pytest.approx(4 / 3.5 - 1)
    assert batches.costliest_rank_per_step == batches.costliest_micro_batches_per_step == 4
    # The same plan at other prices: 4 * 5 / 2 pairs against 3 + 1.
    priced = summarize_batches(batcher, CostModel(per_token=0.0, per_pair=2.0, per_micro_batch=1.0, unit="seconds"))
    assert priced.cost_unit == "seconds"
    assert priced.imbalance == pytest.approx(21 / 15 - 1)
    assert priced.costliest_rank_per_step == 21


def test_rounds_cost_more_where_ranks_wait_in_each():
    options = StepOptions(groups_per_step=4, world_size=2, shuffle=False, max_tokens_per_micro_batch=9)
    batches = summarize_batches(StepBatcher([make_lengths([length]) for length in (9, 6, 5, 4)], options))
    # 9 + 4 against 6 + 5; round by round 9 and 5.
    assert batches.costliest_rank_per_step == 13
    assert batches.costliest_micro_batches_per_step == 14
    assert batches.imbalance == pytest.approx(13 / 12 - 1)


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.add_typer(data_command.app, name="data")
    return app


@pytest.fixture
def tokenizer_folder(tmp_path: Path, build_tokenizer) -> str:
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


PAIR = {"prompt": "hello", "chosen": " world fox", "rejected": " fox"}
ROWS = [PAIR] * 5


def test_inspect_prints_figures_and_json_on_the_last_line(app, tokenizer_folder, write_jsonl, tmp_path: Path):
    path, bad = write_jsonl(*ROWS, "{}"), tmp_path / "bad.jsonl"
    arguments = ["--max-response-tokens", "2", "--on-bad-row", "skip", "--report", str(bad), "--json"]
    arguments += ["--mode", "padded", "--max-tokens", "12", "--batch-size", "4"]
    result = CliRunner().invoke(app, ["data", "inspect", path, "--tokenizer", tokenizer_folder, *arguments])
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert last["data"]["num_groups"] == 5
    assert last["data"]["response_tokens"]["max"] == 2
    assert last["data"]["prefix_saving"] == pytest.approx(6 / 5)
    assert last["batches"]["token_saving"] == pytest.approx(1.0), "whole sequences of one length, each padded to it"
    assert last["report"]["num_rows"] == 6
    assert last["report"]["num_truncated_responses"] == 5
    assert last["report"]["bad_rows"][0]["location"] == f"{path}:6"
    assert last["batches"]["num_steps"] == 2
    assert last["batches"]["tokens_per_micro_batch"]["max"] == 12
    assert len(last["fingerprint"]) == 64
    assert json.loads(bad.read_text())["location"] == f"{path}:6"
    for shown in ("data saving", "token saving", "1.20x", "1 skipped", "padding", "budget filled to 83.3%"):
        assert shown in " ".join(result.stdout.split())
    assert f"skipped {path}:6: missing field" in result.stdout
    assert "reading" not in result.stdout
    for words in (DATA_SAVING, TOKEN_SAVING):
        assert f"x, {words}" in " ".join(result.stdout.split())


def test_inspect_plans_for_several_ranks(app, tokenizer_folder, write_jsonl):
    arguments = [write_jsonl(*ROWS), "--tokenizer", tokenizer_folder, "--batch-size", "3", "--world-size", "2"]
    result = CliRunner().invoke(app, ["data", "inspect", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    # Five equal groups on two ranks: three and two. The one token that their answers share is too short to be shared.
    assert last["batches"]["world_size"] == 2
    assert last["batches"]["token_saving"] == 1
    assert last["batches"]["imbalance"] == pytest.approx(3 / 2.5 - 1)
    assert "prediction" not in last
    assert "2, the busiest 20.0% above the mean in tokens" in " ".join(result.stdout.split())
    assert "predicted" not in result.stdout


def test_inspect_counts_groups_that_begin_alike(app, tokenizer_folder, write_jsonl):
    rows = [PAIR | {"prompt": f"{letter * 40} {number}?"} for letter in "ab" for number in range(3)]
    arguments = [write_jsonl(*rows), "--tokenizer", tokenizer_folder, "--batch-size", "3", "--json"]
    result = CliRunner().invoke(app, ["data", "inspect", *arguments])
    assert result.exit_code == 0, result.output
    batches = json.loads(result.stdout.splitlines()[-1])["batches"]
    assert (batches["num_sharing_groups"], batches["largest_cluster"]) == (6, 3)
    assert "6 groups begin like others" in " ".join(result.stdout.split())


def test_inspect_predicts_the_time_of_a_step_on_this_device(app, tokenizer_folder, write_jsonl, tmp_path: Path):
    config = {"model_type": "llama", "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = [write_jsonl(*ROWS), "--tokenizer", tokenizer_folder, "--world-size", "2"]
    arguments += ["--batch-size", "1"]
    arguments += ["--max-tokens", "256", "--model", str(tmp_path / "config.json"), "--json"]
    result = CliRunner().invoke(app, ["data", "inspect", *arguments])
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    prediction, costs = last["prediction"], last["prediction"]["cost_model"]
    assert prediction["device"] == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert costs["unit"] == last["batches"]["cost_unit"] == "seconds"
    # Each step is one group on each rank: hello world fox EOS and hello fox EOS, the first token unscored.
    one = costs["per_token"] * 7 + costs["per_pair"] * (1 + 2 + 3 + 4 + 1 + 2 + 3) + costs["per_scored"] * 5
    assert prediction["seconds_per_step"] == pytest.approx(one + costs["per_micro_batch"])
    assert prediction["seconds_per_epoch"] == pytest.approx(3 * prediction["seconds_per_step"])
    assert prediction["fit_error"] >= 0
    for shown in ("s per optimizer step", "if ranks wait at every micro-batch", "s per epoch", "fit error"):
        assert shown in " ".join(result.stdout.split())


def test_inspect_counts_the_groups_that_exceed_the_budget(app, tokenizer_folder, write_jsonl):
    arguments = [write_jsonl(*ROWS), "--tokenizer", tokenizer_folder, "--json"]
    found = {}
    for budget in ("3", "7"):
        result = CliRunner().invoke(app, ["data", "inspect", *arguments, "--max-tokens", budget])
        assert result.exit_code == 0, result.output
        found[budget] = (json.loads(result.stdout.splitlines()[-1])["batches"], result.stdout)
    assert [batches["num_larger_groups"] for batches, _ in found.values()] == [5, 0]
    assert "larger groups" in found["3"][1]
    assert "larger groups" not in found["7"][1]
    # Each runs alone.
    assert found["3"][0]["num_micro_batches"] == 5


def test_inspect_names_a_configuration_that_it_cannot_read(app, tokenizer_folder, write_jsonl, tmp_path):
    config = tmp_path / "config.json"
    config.write_text("{")
    arguments = [write_jsonl(*ROWS), "--tokenizer", tokenizer_folder, "--model", str(config)]
    result = CliRunner().invoke(app, ["data", "inspect", *arguments])
    with pytest.raises(InputError, match=r"config\.json: cannot read the model configuration"):
        raise result.exception


def test_inspect_lists_few_bad_rows_and_counts_the_rest(app, tokenizer_folder, write_jsonl):
    path = write_jsonl(*ROWS, *["{}"] * 25)
    arguments = ["data", "inspect", path, "--tokenizer", tokenizer_folder, "--on-bad-row", "skip"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert result.stdout.count("missing field") == 10
    assert "skipped 15 more; --report FILE writes all" in result.stdout


def test_inspect_leaves_input_errors_to_the_caller(app, tokenizer_folder, write_jsonl):
    for arguments, message in (
        ([write_jsonl(*ROWS, "{}", name="bad.jsonl")], r":6: missing field"),
        ([write_jsonl(*ROWS), "--batch-size", "0"], "--batch-size must be at least 1"),
    ):
        result = CliRunner().invoke(app, ["data", "inspect", *arguments, "--tokenizer", tokenizer_folder])
        assert isinstance(result.exception, InputError)
        with pytest.raises(InputError, match=message):
            raise result.exception


def test_inspect_help_has_an_example_and_unknown_modes_are_refused(app):
    help_text = CliRunner().invoke(app, ["data", "inspect", "--help"]).output
    assert "Example: kvpref data inspect" in help_text
    result = CliRunner().invoke(app, ["data", "inspect", "x.jsonl", "--tokenizer", "y", "--mode", "three_pass"])
    assert result.exit_code == 2
    assert "two_pass" in result.output


def place(key: str, num_tokens: int, first: int = 1) -> PlacedImage:
    image = Image(key=key, token_id=9, num_tokens=num_tokens, read=dict)
    return PlacedImage(image, ((first, first + num_tokens),))


def with_images(*keys: str, num_tokens: int = 4) -> Group:
    """Two sequences: a token, an image each (`keys`, one per sequence), three of text, two scored."""
    ids, scored = [1, *[9] * num_tokens, 2, 3, 4, 5, 6], [False] * (num_tokens + 4) + [True] * 2
    return Group([Sequence(ids, scored, images=(place(key, num_tokens),)) for key in keys])


def test_images_are_counted_apart_from_text():
    figures = summarize_dataset(PreferenceDataset([with_images("a", "a"), with_images("a", "a"), make_group(4, 2, 2)]))
    images = figures.images
    assert images is not None
    assert (images.num_images, images.num_unique_images, images.num_groups_with_images) == (2, 1, 2)
    assert images.image_tokens == LengthSummary(mean=4.0, p50=4, p90=4, max=4)
    assert (images.total_image_tokens, images.unique_image_tokens, images.image_saving) == (16, 8, 2.0)
    # Text: 12 of each group with images, of which 6 are the same; 12 of the other, of which 4 are.
    assert images.text_saving == (figures.total_tokens - 16) / (figures.unique_tokens - 8)
    assert summarize_dataset(PreferenceDataset([make_group(4, 2)])).images is None


def test_different_images_in_the_sequences_of_a_group_share_nothing():
    images = summarize_dataset(PreferenceDataset([with_images("a", "b")])).images
    assert images is not None
    assert (images.num_unique_images, images.image_saving) == (2, 1.0)
    dataset = PreferenceDataset([with_images("a", "b")])
    assert dataset.lengths[0].unique_tokens == 19, "one token is shared, and the equal end is behind other images"


@pytest.mark.parametrize("same", [True, False])
def test_groups_cluster_by_their_images(same):
    others = [make_group(8, 2, 2) for _ in range(4)]
    groups = [with_images("a", "a"), *others, with_images("a" if same else "b", "a" if same else "b")]
    clusters = PreferenceDataset(groups).clusters(2, 2)
    assert (clusters.of_group[5] == 0) is same
    assert clusters.shared_tokens[0] == (8 if same else 0)

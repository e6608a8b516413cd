"""Every file in examples/formats becomes the groups that are written out here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvpref.data import DataOptions, PreferenceDataset, load_preferences
from kvpref.losses import make_loss
from kvpref.records.groups import Group

FOLDER = Path(__file__).resolve().parents[4] / "examples" / "formats"

# One line per conversation: "user: 2+2?<|im_end|>assistant: ", and the names of tools in front.
TEMPLATE = (
    "{% for tool in tools or [] %}tool {{ tool.function.name }};{% endfor %}{% for message in messages %}"
    "{{ message.role }}: {{ message.content }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Read(NamedTuple):
    """What is to be read of a group: all texts as a model gets them, without what ends a turn."""

    prompt: str
    responses: tuple[str, ...]
    scores: tuple[float | None, ...] | None = None
    labels: tuple[bool, ...] | None = None
    ranks: tuple[float | None, ...] | None = None


def pair(prompt: str, chosen: str, rejected: str, scores: tuple[float, float] | None = None) -> Read:
    return Read(prompt, (chosen, rejected), scores, (True, False))


def one(prompt: str, response: str, score: float | None = None) -> Read:
    return Read(prompt, (response,), None if score is None else (score,))


USER_2 = "user: 2+2?<|im_end|>assistant: "
USER_3 = "user: 3+3?<|im_end|>assistant: "
BRIEF_2 = f"system: Be brief.<|im_end|>{USER_2}"
BRIEF_3 = f"system: Be brief.<|im_end|>{USER_3}"
AND_3 = "user: 2+2?<|im_end|>assistant: 4<|im_end|>user: And 3+3?<|im_end|>assistant: "
WEATHER = "tool weather;user: Weather in Rome?<|im_end|>assistant: "
BRIEF_WHO = "system: Be brief.<|im_end|>user: Who are you?<|im_end|>assistant: "

GROUPS = {
    "trl/preference.jsonl": [pair("The sky is", " blue.", " green."), pair("Grass is", " green.", " loud.")],
    "trl/preference_implicit.jsonl": [
        pair("user: What color is the sky?<|im_end|>assistant: ", "It is blue.", "It is green."),
        pair(USER_2, "4", "5"),
    ],
    "trl/unpaired.jsonl": [Read("The sky is", (" blue.", " green."), (1, 0)), one("Grass is", " loud.", 0)],
    "trl/unpaired_chat.jsonl": [one(USER_2, "4", 1), one(USER_3, "7", 0)],
    "trl/prompt_completion.jsonl": [one("The sky is", " blue."), one("Grass is", " green.")],
    "trl/messages.jsonl": [one(USER_2, "4|6"), one(BRIEF_WHO, "A model.")],
    "trl/text.jsonl": [one("<s>", "The sky is blue."), one("<s>", "Grass is green.")],
    "trl/completions_and_rewards.jsonl": [
        Read("2+2=", ("4", "5", "four"), (1, 0, 0.5)),
        Read("3+3=", ("6", "7"), (1, 0)),
    ],
    "llama_factory/alpaca_ranking.json": [
        pair("Add the numbers.\n2 and 3", "5", "6"),
        pair("Name a color.", "Blue", "Loud"),
    ],
    "llama_factory/alpaca_history.json": [
        pair(f"system: Be brief.<|im_end|>{AND_3}", "6", "7"),
        pair(USER_2, "4", "5"),
    ],
    "llama_factory/alpaca_kto.json": [one("Add the numbers.\n2 and 3", "5", 1), one("Name a color.", "Loud", 0)],
    "llama_factory/alpaca_outputs.json": [pair("Name a color.", "Blue", "Loud")],
    "llama_factory/sharegpt_ranking.json": [pair(AND_3, "6", "7"), pair(BRIEF_WHO, "A model.", "Nobody.")],
    "llama_factory/sharegpt_kto.json": [one(USER_2, "4", 1), one(USER_3, "7", 0)],
    "llama_factory/openai_kto.json": [one(USER_2, "4", 1), one(USER_3, "7", 0)],
    "llama_factory/sharegpt_tools.json": [one(WEATHER, 'weather{"city": "Rome"}|It is sunny.')],
    "axolotl/chat_template_default.jsonl": [pair(BRIEF_2, "4", "5"), pair(USER_3, "6", "7")],
    "axolotl/chatml_intel.jsonl": [pair(BRIEF_2, "4", "5"), pair(USER_3, "6", "7")],
    "axolotl/llama3_icr.jsonl": [pair(BRIEF_2, "4", "5"), pair(USER_3, "6", "7")],
    "axolotl/chatml_ultra.jsonl": [pair(BRIEF_2, "4", "5"), pair(USER_3, "6", "7")],
    "axolotl/chatml_argilla.jsonl": [pair(BRIEF_2, "4", "5")],
    "axolotl/zephyr_nectar.jsonl": [Read("2+2=", ("5", "4", "fish"), (-2, -1, -3), ranks=(2, 1, 3))],
    "axolotl/kto_user_defined.jsonl": [one(BRIEF_2, "4", 1), one(BRIEF_3, "7", 0)],
    "ms_swift/rejected_response.jsonl": [pair(BRIEF_2, "4", "5"), pair(AND_3, "6", "7")],
    "ms_swift/rejected_messages.jsonl": [pair(USER_2, "4", "5")],
    "ms_swift/kto.jsonl": [one(USER_2, "4", 1), one(USER_3, "7", 0)],
    "ms_swift/query_response.jsonl": [pair(f"system: Be brief.<|im_end|>{AND_3}", "6", "7")],
    "ms_swift/conversation.jsonl": [one(BRIEF_2, "4|6")],
    "ultrafeedback/completions.jsonl": [Read("2+2=", ("4", "5"), (9, 2))],
    "ultrafeedback/binarized.jsonl": [pair(USER_2, "4", "5", (9, 2))],
    "flat/rewards.jsonl": [Read("2+2=", ("4", "5"), (1, 0)), one("3+3=", "7", 0)],
    "flat/helpsteer.jsonl": [one("2+2=", "4"), one("2+2=", "fish")],
}


@pytest.fixture(scope="module")
def template_tokenizer(build_tokenizer: Callable[..., Any]) -> Any:
    return build_tokenizer(chat_template=TEMPLATE)


def load(name: str, tokenizer: Any, **options: Any) -> PreferenceDataset:
    return load_preferences(str(FOLDER / name), tokenizer, DataOptions(**options))


def as_read(group: Group, tokenizer: Any) -> Read:
    """A group in words; turns of one response are set apart by a bar."""
    prompts = {tokenizer.decode(sequence.ids[: sequence.prompt_runs[0][1]]) for sequence in group.sequences}
    (prompt,) = prompts
    responses = []
    for sequence in group.sequences:
        turns = [tokenizer.decode(sequence.ids[first:stop]) for first, stop in sequence.turns]
        responses.append("|".join(turn.replace("<|im_end|>", "").replace("</s>", "") for turn in turns))
    return Read(prompt, tuple(responses), group.scores, group.labels, group.ranks)


def test_all_files_are_here() -> None:
    found = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.json*")}
    assert found == set(GROUPS)


@pytest.mark.parametrize("name", GROUPS)
def test_a_file_becomes_these_groups(name: str, template_tokenizer: Any) -> None:
    groups = load(name, template_tokenizer)
    assert [as_read(group, template_tokenizer) for group in groups] == GROUPS[name]
    assert groups.report is not None
    assert not groups.report.bad_rows


def test_rewards_by_a_column_are_the_same_groups_with_its_value_in_their_names(template_tokenizer: Any) -> None:
    groups = load("flat/rewards.jsonl", template_tokenizer, group_by="problem")
    assert [as_read(group, template_tokenizer) for group in groups] == GROUPS["flat/rewards.jsonl"]
    path = FOLDER / "flat" / "rewards.jsonl"
    assert [group.id for group in groups] == [f"{path}:1 (1)", f"{path}:2 (2)"]
    assert groups.report is not None
    assert groups.report.notices == ("rows of one response were gathered by `problem`: 3 rows, 2 groups",)


LABELLED = [name for name in GROUPS if "kto" in name or "unpaired" in name]


@pytest.mark.parametrize("name", LABELLED)
def test_good_and_bad_responses_are_so_to_kto(name: str, template_tokenizer: Any) -> None:
    loss = make_loss("kto")
    groups = load(name, template_tokenizer)
    prepared = list(loss.prepare(groups))  # type: ignore[attr-defined]
    for group, expected in zip(prepared, GROUPS[name], strict=True):
        assert expected.scores is not None
        desirable = loss._desirable(group)  # type: ignore[attr-defined]
        # Behind its own responses each group has that of another prompt, which is neither.
        assert desirable == [score == 1 for score in expected.scores] + [False]


def test_a_demonstration_is_what_sft_learns(template_tokenizer: Any) -> None:
    (whole, _) = load("trl/messages.jsonl", template_tokenizer)
    assert make_loss("sft").group_units(whole) == whole.sequences[0].num_scored > 2

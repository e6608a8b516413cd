"""The texts of a task: of attempts, and of the places where they part."""

from __future__ import annotations

from agent_templates import PLAIN, THINKS, build_agent_tokenizer, conversation, say

from kvpref.data.reading.template_probes import TemplateProbes
from kvpref.data.reading.trajectories.rows import parse_trajectories
from kvpref.data.reading.trajectories.tasks import Answer, Member, render_task, score_of
from kvpref.data.reading.trajectories.writing import AttemptWriter


def writer(template: str, *, with_questions: bool = False) -> AttemptWriter:
    return AttemptWriter(build_agent_tokenizer(template), TemplateProbes(), with_questions=with_questions)


def test_texts_of_attempts_hold_the_turns_that_go_on() -> None:
    task = parse_trajectories({"trajectories": [{"messages": conversation("warm", thinks=True)}] * 2})
    rendered = render_task(task, writer(THINKS), "task")
    assert rendered.turns == (((1, 1), (1,), (1,)),) * 2
    assert [len(spans) for spans in rendered.spans] == [2, 1, 1] * 2
    assert rendered.branches is None


def test_branches_hold_the_answers_to_one_history() -> None:
    talks = [[say("user", "q"), say("assistant", "one"), say("user", "r"), say("assistant", last)] for last in "xyx"]
    task = parse_trajectories({"trajectories": [{"messages": talk} for talk in talks]})
    rendered = render_task(task, writer(PLAIN, with_questions=True), "turn")
    assert rendered.branches is not None
    [[first, second]] = rendered.branches
    assert first.members == [Member(0, 1), Member(2, 1)]
    assert second.members == [Member(1, 1)]
    assert rendered.texts == (first.text, second.text)
    assert rendered.num_single == 1


def test_scores_of_answers_are_means_over_rated_attempts() -> None:
    items = [{"messages": [say("user", "q"), say("assistant", "a")], "score": score} for score in (1.0, None, 0.5)]
    attempts = parse_trajectories({"trajectories": items}).attempts
    assert score_of(attempts, Answer("", (), [Member(number, 0) for number in range(3)])) == 0.75
    assert score_of(attempts, Answer("", (), [Member(1, 0)])) is None

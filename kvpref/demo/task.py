"""The task: name the largest of three digits, after a long series of solved examples.

A program can tell whether an answer is right, and the prompt is much longer than the answer, as in few-shot prompting.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

from kvpref.atomic_files import write_text

NUM_DIGITS = 3
MIN_EXAMPLES, MAX_EXAMPLES = 12, 20
NUM_ANSWERS = 4
# The largest digit is drawn uniformly from these, so that no single answer is a good guess.
LARGEST_DIGITS = range(4, 10)

ARROW, ANSWER_WORD, END_OF_EXAMPLE = "->", "largest", "\n"

Digits = tuple[int, ...]


class Pair(NamedTuple):
    """One row of the data: the texts as written to the file."""

    prompt: str
    chosen: str
    rejected: str


def make_pairs(seed: int, num_train: int, num_eval: int) -> tuple[list[Pair], list[Pair]]:
    """Training and evaluation pairs; no question of the evaluation is asked in training.

    The same seed gives the same pairs on every machine.
    """
    generator = random.Random(f"kvpref demo {seed}")
    held_out: set[Digits] = set()
    evaluation: list[Pair] = []
    while len(evaluation) < num_eval:
        question = _draw_question(generator)
        if question not in held_out:
            held_out.add(question)
            evaluation.append(_make_pair(question, generator))
    training: list[Pair] = []
    while len(training) < num_train:
        question = _draw_question(generator)
        if question not in held_out:
            training.append(_make_pair(question, generator))
    return training, evaluation


class ScoredAnswers(NamedTuple):
    """One row of the data with several answers, the right one among them."""

    prompt: str
    responses: list[str]
    scores: list[float]


def make_groups(seed: int, pairs: list[Pair]) -> list[ScoredAnswers]:
    """The prompts of the pairs, each with its right answer (score 1) and three wrong ones (score 0), shuffled."""
    generator = random.Random(f"kvpref demo groups {seed}")
    groups = []
    for pair in pairs:
        wrong = [answer for answer in map(_answer, range(10)) if answer != pair.chosen]
        responses = [pair.chosen, *generator.sample(wrong, NUM_ANSWERS - 1)]
        generator.shuffle(responses)
        scores = [float(response == pair.chosen) for response in responses]
        groups.append(ScoredAnswers(pair.prompt, responses, scores))
    return groups


def write_groups(groups: list[ScoredAnswers], path: Path) -> None:
    """Write the rows as JSON lines, the format of users' own files."""
    write_text(path, "".join(json.dumps(group._asdict()) + "\n" for group in groups))


def write_pairs(pairs: list[Pair], path: Path) -> None:
    """Write the rows as JSON lines, the format of users' own files."""
    write_text(path, "".join(json.dumps(pair._asdict()) + "\n" for pair in pairs))


def check(prompt: str, response: str) -> bool:
    """Whether `response` answers the question at the end of `prompt`."""
    question, _, _ = prompt.rpartition(END_OF_EXAMPLE)[2].partition(ARROW)
    largest = max(int(digit) for digit in question.split())
    return response.split() == [ANSWER_WORD, str(largest)]


def _draw_question(generator: random.Random) -> Digits:
    largest = generator.choice(LARGEST_DIGITS)
    digits = [largest, *(generator.randrange(largest) for _ in range(NUM_DIGITS - 1))]
    generator.shuffle(digits)
    return tuple(digits)


def _make_pair(question: Digits, generator: random.Random) -> Pair:
    examples = [_draw_question(generator) for _ in range(generator.randint(MIN_EXAMPLES, MAX_EXAMPLES))]
    solved = [_ask(digits) + _answer(max(digits)) + END_OF_EXAMPLE for digits in examples]
    return Pair(
        prompt="".join(solved) + _ask(question),
        chosen=_answer(max(question)),
        rejected=_answer(_mistake(max(question), generator)),
    )


def _mistake(largest: int, generator: random.Random) -> int:
    """Any other digit: if it were always a smaller one, `dpo` would teach answering with large digits."""
    return generator.choice([digit for digit in range(10) if digit != largest])


def _ask(digits: Digits) -> str:
    return f"{' '.join(map(str, digits))} {ARROW}"


def _answer(digit: int) -> str:
    return f" {ANSWER_WORD} {digit}"

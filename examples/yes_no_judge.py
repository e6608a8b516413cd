"""A judge that answers yes or no: only two logits are read, at the verdict that ends each response.

    python examples/yes_no_judge.py

The needs depend on settings (which tokens mean yes and no), so the loss is a class. The question is shared by the
answers that are judged, and encoded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import toy
from torch.nn.functional import binary_cross_entropy_with_logits

import kvpref
from kvpref.losses import PreferenceLoss

YES, NO, VERDICT = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class YesNoJudge(PreferenceLoss):
    """Cross-entropy of ``P(yes) / (P(yes) + P(no))`` at each response's last token against the column `rating`."""

    yes: int
    """Token id of yes."""

    no: int
    """Token id of no."""

    columns = ("rating",)

    @property
    def head(self) -> kvpref.HeadOptions:
        return kvpref.HeadOptions(logit_ids=(self.yes, self.no))

    def __call__(self, policy, reference, batch):
        yes, no = policy.logits[policy.cu_seqlens[1:] - 1].unbind(1)
        ratings = batch.sequence_column("rating")
        loss = binary_cross_entropy_with_logits(yes - no, ratings)
        accuracy = ((yes > no) == (ratings > 0.5)).float().mean()
        return kvpref.LossOutput(loss, {"accuracy": accuracy})


def with_verdicts(group: kvpref.Group) -> kvpref.Group:
    """Each answer followed by a verdict, which alone is scored; the scores become a column of ratings."""
    sequences = [
        kvpref.Sequence((*answer.input_ids, VERDICT, YES), (False,) * (len(answer) + 1) + (True,))
        for answer in group.sequences
    ]
    return kvpref.Group(sequences, id=group.id, columns={"rating": list(group.scores)})


if __name__ == "__main__":
    groups = [with_verdicts(group) for group in toy.make_scored_groups()]
    logged = toy.train(YesNoJudge(yes=YES, no=NO), groups)
    print(f"loss {logged[0]['loss']:.3f} -> {logged[-1]['loss']:.3f}")
    print(f"accuracy {logged[0]['accuracy']:.2f} -> {logged[-1]['accuracy']:.2f}")

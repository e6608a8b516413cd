"""The forward that TRL calls, against TRL's own on the same padded rows: every field and the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs the extra kvpref[trl]")

from tiny_models import VOCAB_SIZE, tiny_model  # noqa: E402
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head  # noqa: E402

from kvpref import InputError  # noqa: E402
from kvpref.integrations.trl.forwards import add_shared_prompt_head  # noqa: E402
from kvpref.integrations.trl.padded import PaddedRows  # noqa: E402
from kvpref.plan.modes import MODES  # noqa: E402

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# TRL computes logits in fp32; sums in another order.
TOLERANCE = 2e-5


def padded_rows(side: str, *, prompt_tokens: int = 20, num_rows: int = 5) -> dict[str, torch.Tensor]:
    """Rows that begin with one prompt; GRPO pads prompts left and completions right at once."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        return torch.randint(3, VOCAB_SIZE, (count,), generator=generator)

    prompt, longest = draw(prompt_tokens), 9
    ids, mask, labels = [], [], []
    for row in range(num_rows):
        response = draw(longest - row)
        left = {"right": 0, "left": row, "both": 3}[side]
        pads = (torch.zeros(left, dtype=torch.int64), torch.zeros(3 + row - left, dtype=torch.int64))
        ids.append(torch.cat([pads[0], prompt, response, pads[1]]))
        mask.append(torch.cat([pads[0], torch.ones(len(prompt) + len(response), dtype=torch.int64), pads[1]]))
        scored = torch.cat([prompt * 0 - 100, response])
        scored[-2] = -100  # a hole, as tools leave one
        labels.append(torch.cat([pads[0] - 100, scored, pads[1] - 100]))
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask), "labels": torch.stack(labels)}


def model_and_output(add: Any, variant: str, rows: dict[str, torch.Tensor], **options: Any) -> tuple[Any, Any]:
    model = tiny_model(variant)
    model.set_attn_implementation("sdpa")
    # Peaked enough for some tokens to be the most likely.
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(4 * head.weight.detach())
    add(model, outputs=FIELDS, **options)
    output: FusedCausalLMOutput = model(**rows, fused_lm_head=True, use_cache=False)
    (output.log_probs.sum() + 0.3 * output.entropy.square().sum()).backward()
    return model, output


@pytest.mark.parametrize(
    ("variant", "side", "mode"),
    [
        *(("llama", side, mode) for side in ("right", "left", "both") for mode in MODES),
        ("granite", "both", "two_pass"),  # scales its logits
        ("gpt2", "right", "two_pass"),
    ],
)
def test_every_field_and_gradient(variant: str, side: str, mode: str) -> None:
    rows = padded_rows(side)
    theirs, truth = model_and_output(add_fused_lm_head, variant, rows, temperature=0.7)
    ours, found = model_and_output(add_shared_prompt_head, variant, rows, temperature=0.7, mode=mode)
    assert torch.equal(found.label_mask, truth.label_mask)
    assert torch.equal(found.is_top1, truth.is_top1)
    for name in ("loss", *FIELDS[:-1]):
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), rtol=TOLERANCE, atol=TOLERANCE)
    scale = max(float(parameter.grad.abs().max()) for parameter in theirs.parameters())
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("factor", [1.0, 5.0, 30.0])
def test_most_likely_tokens(factor: float) -> None:
    """Each token of a response is made the most likely one or the second; flat and peaked distributions."""
    rows = padded_rows("right")
    model = tiny_model("llama")
    add_shared_prompt_head(model, outputs=FIELDS, mode="two_pass")
    model.get_output_embeddings().weight.data.mul_(factor)
    first, truth = 20, torch.zeros(rows["input_ids"][:, 1:].shape, dtype=torch.bool)
    with torch.no_grad():
        for column in range(first, 25):  # what a token is decides what follows
            logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
            rank = column % 2
            rows["input_ids"][:, column] = logits[:, column - 1].topk(2).indices[:, rank]
            truth[:, column - 1] = rank == 0
        labels = torch.full_like(rows["labels"], -100)
        labels[:, first:25] = rows["input_ids"][:, first:25]
        found = model(**{**rows, "labels": labels}, fused_lm_head=True)
    assert torch.equal(found.is_top1, truth)
    assert truth.any()
    assert (~truth[:, first - 1 : 24]).any()


def test_a_batch_without_labels_has_a_gradient_of_zero() -> None:
    rows = padded_rows("right")
    rows["labels"] = torch.full_like(rows["labels"], -100)
    model, output = model_and_output(add_shared_prompt_head, "llama", rows, mode="two_pass")
    assert float(output.loss) == 0
    assert not output.log_probs.any()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_other_calls_are_the_models_own() -> None:
    rows = padded_rows("right")
    rows.pop("labels")
    model = tiny_model("llama").eval()
    before = model(**rows).logits
    add_shared_prompt_head(model, mode="two_pass")
    mask = rows["attention_mask"].bool()
    torch.testing.assert_close(model(**rows).logits[mask], before[mask], rtol=TOLERANCE, atol=TOLERANCE)


def refused(rows: dict[str, torch.Tensor]) -> str:
    with pytest.raises(InputError) as error:
        PaddedRows.from_labels(
            rows["input_ids"], rows["attention_mask"], rows["labels"], position_ids=rows.get("position_ids")
        )
    return str(error.value)


def test_rows_that_would_be_read_wrongly_are_refused() -> None:
    rows = padded_rows("both")
    hole = {**rows, "attention_mask": rows["attention_mask"].clone()}
    hole["attention_mask"][2, 10] = 0
    assert "one run of ones per row" in refused(hole)
    assert "row 2 has 2" in refused(hole)
    empty = {**rows, "attention_mask": rows["attention_mask"].clone()}
    empty["attention_mask"][1] = 0
    assert "row 1 has 0" in refused(empty)
    padding = {**rows, "labels": rows["labels"].clone()}
    padding["labels"][0, 1] = 0
    assert "padding" in refused(padding)
    others = {**rows, "labels": torch.where(rows["labels"] == -100, -100, 5)}
    assert "own tokens" in refused(others)
    first = {**rows, "labels": rows["labels"].clone()}
    first["labels"][0, 3] = rows["input_ids"][0, 3]
    assert "first token" in refused(first)
    positions = {**rows, "position_ids": torch.arange(rows["input_ids"].shape[1]).expand_as(rows["input_ids"])}
    assert "position_ids" in refused(positions)
    assert "shape" in refused({**rows, "attention_mask": rows["attention_mask"][:, 1:]})


def test_positions_of_the_rows_themselves_are_accepted() -> None:
    rows = padded_rows("both")
    positions = (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found = PaddedRows.from_labels(rows["input_ids"], rows["attention_mask"], rows["labels"], positions)
    assert found.batch.num_unique_tokens < found.batch.num_total_tokens


def test_the_first_column_is_never_scored() -> None:
    """Labels are shifted, so the label of the first column has no place in what is returned."""
    rows = padded_rows("right")
    labels = rows["labels"].clone()
    labels[:, 0] = rows["input_ids"][:, 0]
    with_first = PaddedRows.from_labels(rows["input_ids"], rows["attention_mask"], labels)
    without = PaddedRows.from_labels(rows["input_ids"], rows["attention_mask"], rows["labels"])
    assert torch.equal(with_first.scored, without.scored)
    assert torch.equal(labels[:, 0], rows["input_ids"][:, 0])  # the caller's labels are not written to


def test_inputs_that_cannot_travel_are_refused() -> None:
    rows = padded_rows("right")
    model = tiny_model("llama")
    add_shared_prompt_head(model, mode="two_pass")
    with pytest.raises(InputError, match="inputs_embeds"):
        model(**rows, inputs_embeds=torch.zeros(5, 32, 32), fused_lm_head=True)

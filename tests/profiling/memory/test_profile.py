"""Profiles of real steps on tiny models: sums that must hold, formulas, and what is left out."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from sample_groups import tokens
from tiny_models import tiny_model
from transformers import PreTrainedModel

import kvpref
from kvpref import Group, InputError
from kvpref.profiling.memory import profile as memory_profile
from kvpref.profiling.memory.loss import response_weights, weighted_likelihood
from kvpref.profiling.memory.profile import MemoryProfile, profile_cases
from kvpref.profiling.memory.step import VARIANTS, MemoryCase, ProfiledStep

PROMPT, RESPONSE, NUM_RESPONSES = 120, 24, 6


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Its tied vocabulary makes gradients that a wrong count of those in passing would show."""
    return kvpref.attach(tiny_model("llama:tied", hidden_size=64, intermediate_size=256, vocab_size=2003))


def groups(num_responses: int = NUM_RESPONSES) -> list[Group]:
    prompt = tokens(PROMPT, 1)
    # First tokens differ, so that responses share nothing and the prompt alone is a prefix.
    responses = [[3 + index, *tokens(RESPONSE - 1, 2 + index)] for index in range(num_responses)]
    sequences = [kvpref.Sequence.from_prompt_and_response(prompt, response) for response in responses]
    return [Group(sequences, scores=[float(index) for index in range(num_responses)])]


def profile(model: PreTrainedModel, cases: Sequence[MemoryCase]) -> dict[str, MemoryProfile]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    profiles, skipped = profile_cases(model, cases, weighted_likelihood, optimizer)
    assert skipped == {}
    return {item.name: item for item in profiles}


@pytest.fixture(scope="module")
def profiles(model: PreTrainedModel) -> dict[str, MemoryProfile]:
    cases = [MemoryCase(variant=name, cut=[groups()], max_tokens_per_chunk=48) for name in VARIANTS]
    return profile(model, cases)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_peak_is_the_sum_of_its_parts(variant: str, profiles: dict[str, MemoryProfile]) -> None:
    found = profiles[variant]
    assert sum(found.peak.bytes_by_category.values()) == found.peak.total_bytes
    # To 1%: kernels' workspace is seen by the allocator alone; here no kernel runs at the peak.
    assert found.tracked_bytes == pytest.approx(found.allocated_bytes, rel=0.01)
    assert max(point.total_bytes for point in found.timeline) == found.tracked_bytes
    assert max(held.total_bytes for held in found.peak_by_region.values()) == found.tracked_bytes
    assert found.peak.bytes_by_category["optimizer"] > 2 * found.peak.bytes_by_category["parameters"] * 0.99
    assert found.reserved_bytes is None
    assert found.allocator_snapshot is None


@pytest.mark.parametrize(
    ("variant", "num_tokens"), [("full", PROMPT), ("bounded", PROMPT), ("packed", 0), ("padded", 0)]
)
def test_prefix_keys_and_values_take_their_formula(
    variant: str, num_tokens: int, profiles: dict[str, MemoryProfile], model: PreTrainedModel
) -> None:
    found, config = profiles[variant], model.config
    expected = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * num_tokens * 4
    assert found.prefix_bytes == found.prefix_size.num_bytes == expected


def test_sharing_and_chunks_lower_the_peak(profiles: dict[str, MemoryProfile]) -> None:
    peaks = {name: found.peak.total_bytes for name, found in profiles.items()}
    assert peaks["bounded"] < peaks["full"] < peaks["packed"] <= peaks["padded"]
    assert profiles["packed"].facts["total_tokens"] == NUM_RESPONSES * (PROMPT + RESPONSE)
    assert profiles["full"].facts["unique_tokens"] == PROMPT + NUM_RESPONSES * RESPONSE


def test_bounded_does_not_grow_with_the_responses(model: PreTrainedModel) -> None:
    """From 8 to 32 responses: at most 10% more, where the others repeat their activations."""
    cases = [
        MemoryCase(variant=name, cut=[groups(count)], num_responses=count, max_tokens_per_chunk=48)
        for name in ("bounded", "full")
        for count in (8, 32)
    ]
    found = profile(model, cases)
    assert list(found) == ["bounded N=8", "bounded N=32", "full N=8", "full N=32"]
    assert found["bounded N=32"].peak.total_bytes <= 1.1 * found["bounded N=8"].peak.total_bytes
    assert found["full N=32"].peak.total_bytes >= 1.5 * found["full N=8"].peak.total_bytes


def test_one_case_that_does_not_fit_leaves_the_others(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ProfiledStep.run

    def out_of_memory(step: ProfiledStep) -> None:
        if step.case.variant == "padded":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")
        run(step)

    monkeypatch.setattr(ProfiledStep, "run", out_of_memory)
    cases = [MemoryCase(variant=name, cut=[groups()]) for name in ("padded", "packed")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    started: list[str] = []
    found, skipped = profile_cases(model, cases, weighted_likelihood, optimizer, on_start=started.append)
    assert [item.name for item in found] == ["packed"]
    assert skipped == {"padded": "out of device memory: CUDA out of memory. Tried to allocate 20 GiB"}
    assert started == ["padded", "packed"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_recording_is_switched_off_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **settings: calls.append(settings))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", calls.append)
    path = tmp_path / "new" / "full.pickle"
    memory_profile.record_allocations(lambda: calls.append("run"), path)
    assert calls == [{"max_entries": memory_profile.MAX_HISTORY_ENTRIES}, "run", str(path), {"enabled": None}]
    assert path.parent.is_dir()

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        memory_profile.record_allocations(fail, path)
    assert calls[-1] == {"enabled": None}


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(InputError, match="unknown variant 'half'; choose from: full, bounded"):
        MemoryCase(variant="half", cut=[groups()])


def test_a_chunk_bound_reaches_the_bounded_schedule_only() -> None:
    options = {name: MemoryCase(variant=name, cut=[], max_tokens_per_chunk=7).options for name in VARIANTS}
    assert {name: each.max_tokens_per_chunk for name, each in options.items() if each.max_tokens_per_chunk} == {
        "bounded": 7
    }


def test_weights_of_responses() -> None:
    sequences = groups(4)[0].sequences
    assert response_weights(Group(sequences)) == [0.25] * 4
    assert response_weights(Group(sequences, scores=[0.0, 1.0, None, 2.0])) == [0.0, 0.25, 0.25, 0.5]


def test_the_loss_is_the_weighted_likelihood(model: PreTrainedModel) -> None:
    batch = kvpref.collate([*groups(3), *groups(1)])
    policy = kvpref.response_logps(model, batch)
    sums = policy.sum()
    expected = -((0 * sums[0] + sums[1] + 2 * sums[2]) / 3 + sums[3]) / 2
    torch.testing.assert_close(weighted_likelihood(policy, None, batch).loss, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_allocator_is_recorded(tmp_path: Path) -> None:
    model = kvpref.attach(tiny_model("llama", hidden_size=64, intermediate_size=256)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    cases = [MemoryCase(variant="full", cut=[groups()])]
    (found,), skipped = profile_cases(model, cases, weighted_likelihood, optimizer, snapshots=tmp_path)
    assert skipped == {}
    assert found.allocator_snapshot == str(tmp_path / "full.pickle")
    recorded = pickle.loads((tmp_path / "full.pickle").read_bytes())
    assert any(segment["blocks"] for segment in recorded["segments"])
    assert found.reserved_bytes is not None
    assert found.reserved_bytes >= found.allocated_bytes >= found.tracked_bytes
    assert found.peak.total_bytes == found.allocated_bytes

"""torch.compile of the layers: the same numbers, no graph break, and no recompilation per batch shape."""

from __future__ import annotations

import random

import oracle
import pytest
import torch
from sample_groups import pairs
from tiny_hybrids import tiny_hybrid
from tiny_models import tiny_model
from torch._dynamo.testing import CompileCounterWithBackend

import kvpref
from kvpref import Group, InputError, Sequence, UnsupportedModelError
from kvpref.engine import bounded

# The compiled graph runs the same operators in the same order.
FP64_TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def random_batch(seed: int) -> kvpref.Batch:
    """Two to four prompts with two to four responses, all of different lengths."""
    generator = random.Random(seed)

    def tokens(longest: int) -> list[int]:
        return [generator.randint(5, 90) for _ in range(generator.randint(2, longest))]

    def group() -> Group:
        prompt = tokens(12)
        responses = [[5 + index, *tokens(9)] for index in range(generator.randint(2, 4))]
        return Group([Sequence.from_prompt_and_response(prompt, response) for response in responses])

    return kvpref.collate([group() for _ in range(generator.randint(2, 4))], min_shared_tokens=1)


def num_graphs(counter: CompileCounterWithBackend) -> int:
    """Graphs that compute something."""
    return sum(any(node.op == "call_function" for node in graph.graph.nodes) for graph in counter.graphs)


@pytest.mark.parametrize(
    "checkpointing",
    [pytest.param(False, id="plain"), pytest.param(True, id="checkpointed", marks=pytest.mark.full)],
)
def test_one_graph_per_kind_of_pass_for_all_layers_and_shapes(checkpointing: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = kvpref.attach(tiny_model("llama", torch.float64))
    plain = kvpref.attach(oracle.twin(model))
    if checkpointing:
        oracle.checkpoint_layers(model)
    kvpref.compile_layers(model, backend=counter)
    for seed in range(6):
        batch = random_batch(seed)
        weights = torch.randn(batch.num_scored_tokens, dtype=torch.float64)
        results = []
        for each in (model, plain):
            each.zero_grad()
            logps = kvpref.response_logps(each, batch).token_logps
            (logps * weights).sum().backward()
            results.append(oracle.Result(logps.detach(), oracle.grads_of(each)))
        oracle.assert_same(*results, FP64_TOLERANCE)
    # Prompts, and responses against their cache.
    assert num_graphs(counter) == 2


@pytest.mark.full
@pytest.mark.parametrize(
    ("variant", "mode"),
    [
        ("qwen3", "two_pass"),
        *(
            pytest.param(*pair, marks=pytest.mark.full)
            for pair in (("gpt2", "two_pass"), ("llama", "one_pass"), ("llama", "padded"))
        ),
    ],
)
def test_families_and_modes(variant: str, mode: str) -> None:
    groups = pairs()
    # With a scale per layer, GPT-2's layers compile one by one.
    settings = {"scale_attn_by_inverse_layer_idx": False} if variant == "gpt2" else {}
    model = tiny_model(variant, torch.float64, **settings)
    truth = oracle.naive(oracle.twin(model), groups)
    kvpref.compile_layers(kvpref.attach(model), backend="aot_eager")
    batch = kvpref.collate(groups, min_shared_tokens=1)
    oracle.assert_same(oracle.shared(model, batch, mode=mode), truth, FP64_TOLERANCE)


@pytest.mark.full
def test_with_an_adapter() -> None:
    peft = pytest.importorskip("peft", reason="needs the peft extra")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = kvpref.attach(peft.get_peft_model(tiny_model("llama", torch.float64), config).double())
    batch = random_batch(0)
    expected = kvpref.response_logps(model, batch).token_logps
    kvpref.compile_layers(model, backend="aot_eager")
    found = kvpref.response_logps(model, batch).token_logps
    torch.testing.assert_close(found, expected, rtol=FP64_TOLERANCE, atol=0)


def test_refusals() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match=r"kvpref\.attach"):
        kvpref.compile_layers(model)
    with pytest.raises(InputError, match="dynamic shapes"):
        kvpref.compile_layers(kvpref.attach(model), dynamic=False)


@pytest.mark.full
def test_bounded_needs_no_new_graph_for_new_shapes() -> None:
    """Chunks differ in what they read, whether others read them, and gradients: more kinds than torch's limit of 8."""
    counter = CompileCounterWithBackend("eager")
    model = kvpref.attach(tiny_model("gpt2:plain", torch.float64))
    plain = kvpref.attach(oracle.twin(model))
    kvpref.compile_layers(model, backend=counter)
    nums = []
    for seed, max_tokens in ((0, 7), (1, 7), (3, 9), (4, 12)):
        batch = random_batch(seed)
        for each in (model, plain):
            each.zero_grad()
            kvpref.forward_backward(
                each, batch, oracle.weighted_loss, schedule="bounded", max_tokens_per_chunk=max_tokens
            )
        for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert oracle.relative_error(found.grad, expected.grad) < FP64_TOLERANCE, name
        nums.append(num_graphs(counter))
    assert 8 < nums[1] < 20
    assert len(set(nums[1:])) == 1


def test_keys_and_values_in_host_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer would be compiled anew."""
    model = kvpref.compile_layers(kvpref.attach(tiny_model("llama")), backend="eager")
    monkeypatch.setattr(bounded, "moves_to_host", lambda device: True)
    with pytest.raises(UnsupportedModelError, match="leave out compile_layers"):
        kvpref.forward_backward(model, random_batch(0), oracle.weighted_loss, schedule="bounded", prefix_cache="cpu")


def test_layers_that_carry_a_state_stay_as_they_are() -> None:
    counter = CompileCounterWithBackend("eager")
    model = kvpref.attach(tiny_hybrid("Lfm2", torch.float64))
    plain = kvpref.attach(oracle.twin(model))
    kvpref.compile_layers(model, backend=counter)
    batch = random_batch(0)
    found, expected = (kvpref.response_logps(each, batch).token_logps for each in (model, plain))
    torch.testing.assert_close(found, expected, rtol=FP64_TOLERANCE, atol=0)
    assert num_graphs(counter) >= 2  # prompts, and responses against their cache
    with pytest.raises(UnsupportedModelError, match="all carry a state"):
        kvpref.compile_layers(kvpref.attach(tiny_hybrid("Mamba2")))

"""Images of a padded call on CUDA: found equal there and served as on the CPU."""

from __future__ import annotations

import pytest
import torch
from padded_batches import switch_on
from vision_calls import padded_call
from vision_models import tiny_vision_model

from kvpref.models.vision.fingerprints import image_keys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_keys_are_those_of_the_cpu() -> None:
    pixels = torch.randn(3, 700, 1176)
    pixels[2] = pixels[0]
    keys = image_keys([{"pixel_values": one, "grid": torch.tensor([1, 2])} for one in pixels])
    assert keys[0] == keys[2] != keys[1]
    assert keys == image_keys([{"pixel_values": one.cuda(), "grid": torch.tensor([1, 2])} for one in pixels])


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_a_padded_call(name: str) -> None:
    model = tiny_vision_model(name).cuda().eval()
    call = {key: value.cuda() for key, value in padded_call(name).items()}
    with torch.no_grad():
        truth = model(**call).logits
        with switch_on(model) as switch:
            found = model(**call).logits
    assert switch.stats.num_served == 1, switch.stats
    real = call["attention_mask"].bool()
    # fp32 without TF32; sums in another order.
    torch.testing.assert_close(found[real], truth[real], rtol=1e-3, atol=1e-3)

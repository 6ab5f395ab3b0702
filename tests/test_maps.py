"""Attention maps against torch's own attention, and on the shipped student."""

import pytest
import torch
import torch.nn.functional as F

import snapgen_core
from snapgen_core.maps import attention_weights, word_maps, word_rows
from snapgen_core.unet.attention import Attention, AttentionOptions


@pytest.fixture(scope="module")
def pipe():
    pipe = snapgen_core.load("tiny", "base")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kv_heads", [1, 2, None])
def test_weights_are_those_that_the_attention_uses(kv_heads):
    torch.manual_seed(0)
    attention = Attention(32, 20, AttentionOptions(20, 8, kv_heads, 3, True, None, 8))
    x, context = torch.randn(2, 5, 32), torch.randn(2, 7, 20)
    q = attention.norm_q(attention.to_q(x).unflatten(-1, (4, 8)))
    weights = attention_weights(attention, q, context)
    # Attention to values that are one-hot in the context's rows gives the weights themselves.
    k, _ = attention.keys_and_values(context)
    k = k.repeat_interleave(4 // k.shape[2], dim=2)
    one_hot = torch.eye(7).expand(2, 4, 7, 7)
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), one_hot).mean(dim=1)
    assert torch.allclose(weights, expected, atol=1e-6)
    assert torch.allclose(weights.sum(dim=-1), torch.ones(2, 5))


def test_rows_of_words(pipe):
    T = pipe.text.shape.clip_tokens
    rows = word_rows(pipe.text, "two dogs, a DOG and two doughnuts")
    assert list(rows) == ["two", "dogs", "a", "DOG", "and", "doughnuts"]
    assert rows["two"][:2] == [1, rows["and"][0] + 1] and len(rows["two"]) == 4  # twice in both
    assert all(any(row < T for row in places) and any(row >= T for row in places) for places in rows.values())
    used = [row for places in rows.values() for row in places]
    assert len(used) == len(set(used)) and 0 not in used and T not in used  # no word owns the start tokens


def test_words_beyond_the_encoders_have_no_rows(pipe):
    rows = word_rows(pipe.text, "dog " * 40 + "cat")
    assert rows["cat"] == [] and len(rows["dog"]) > 20


def test_maps_of_a_picture(pipe):
    prompt = "a red car left of a blue balloon"
    picture, maps = word_maps(pipe, prompt, seed=0, steps=4)
    expected = pipe(prompt, 4, 4.0, torch.Generator().manual_seed(0), output_type="pt").images[0]
    assert torch.allclose(picture, expected, atol=1e-5)  # looking changes nothing
    assert list(maps) == prompt.replace(" a blue", " blue").split()
    assert all(tuple(share.shape) == (8, 8) and share.min() >= 0 for share in maps.values())
    assert sum(maps.values()).max() < 1
    again, unguided = word_maps(pipe, prompt, seed=0, steps=4), word_maps(pipe, prompt, seed=0, steps=4, guidance=1.0)
    assert all(torch.equal(again[1][word], share) for word, share in maps.items())
    assert not torch.allclose(unguided[1]["red"], maps["red"])


@pytest.mark.parametrize("seed", range(3))
def test_a_colour_is_read_where_it_is_painted(pipe, seed):
    picture, maps = word_maps(pipe, "a red car left of a blue balloon", seed=seed)
    small = F.avg_pool2d(picture[None], 8)[0].flatten(1)  # [3, 64]: the mean colour of each position
    redder = small[0] - small[2]
    assert redder[maps["red"].argmax()] > 0.2 and redder[maps["blue"].argmax()] < -0.2

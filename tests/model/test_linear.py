"""Linear layers on all threads: the same numbers, only where they are meant to be used."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litgpt.config import Config
from litgpt_kv import GPT
from litgpt_kv.model import linear
from litgpt_kv.model.linear import LEAST_WEIGHTS, MOST_ROWS, Linear, speed_up


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def products(monkeypatch):
    """Counts the split products."""
    calls = []
    true = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a: calls.append(1) or true(*a))
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 2), (MOST_ROWS, 1)])
def test_the_same_numbers(two_threads, monkeypatch, bias, shape):
    calls = products(monkeypatch)
    layer = Linear(300, 512, bias=bias, dtype=torch.float64)
    x = torch.randn(*shape, 300, dtype=torch.float64)
    with torch.inference_mode():
        got = layer(x)
        torch.testing.assert_close(got, F.linear(x, layer.weight, layer.bias), atol=1e-12, rtol=0)
    assert got.shape == (*shape, 512)
    assert len(calls) == 1


def test_only_few_rows_of_large_float_layers_in_inference_mode(two_threads, monkeypatch):
    calls = products(monkeypatch)
    monkeypatch.setattr(linear, "prefers_onednn", lambda: False)  # `test_packed` tests where it is true
    large, odd = Linear(300, 700), Linear(700, 301)
    with torch.inference_mode():
        for layer, rows in ((large, MOST_ROWS + 1), (odd, 1)):
            x = torch.randn(rows, layer.in_features)
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        half = large.to(torch.bfloat16)
        half(torch.randn(1, 300, dtype=torch.bfloat16))
    x = torch.randn(1, 700, requires_grad=True)
    odd(x).sum().backward()
    assert x.grad is not None
    assert not calls


def test_it_compiles_to_one_graph(two_threads):
    layer = Linear(500, 500)
    with torch.inference_mode():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        x = torch.randn(1, 500)
        torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-5)


def test_the_model_uses_it_and_keeps_names_and_classes_of_others(two_threads, monkeypatch):
    config = Config.from_name("pythia-14m", n_layer=1, padded_vocab_size=4096)
    model = GPT(config).eval()
    assert isinstance(model.lm_head, Linear)
    calls = products(monkeypatch)
    x = torch.tensor([[3]])
    with torch.no_grad():
        plain = model(x)
    assert not calls  # outside of inference mode everything is litgpt's to the bit
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
    assert calls

    class Other(nn.Linear):
        pass

    n = int(LEAST_WEIGHTS**0.5) + 1
    holder = nn.Sequential(Other(n, n), nn.Linear(n, n), nn.Linear(2, 2))
    speed_up(holder)
    assert [type(m) for m in holder] == [Other, Linear, nn.Linear]

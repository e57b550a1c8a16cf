"""Sampling: the settings, the noise, and rows that get a new request."""

import pytest
import torch

from litgpt_kv import SamplingArgs
from litgpt_kv.generate.request import Request
from litgpt_kv.generate.sampling import Sampler, exponential, logprobs_of


def sampler_of(args: SamplingArgs, count: int, vocabulary: int, **request) -> Sampler:
    sampler = Sampler(count, vocabulary, torch.device("cpu"))
    prompt = request.pop("prompt", [0])
    sampler.assign({b: Request(prompt, sampling=one, **request) for b, one in enumerate(args.rows(count))})
    return sampler


def test_sampling_keeps_to_top_k_and_top_p():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]])).repeat(500, 1)
    drawn = sampler_of(SamplingArgs(top_k=2, seed=list(range(1000))), 1000, 4)(logits).view(-1, 2)
    assert set(drawn[:, 0].tolist()) == {0, 1}
    assert set(drawn[:, 1].tolist()) == {2, 3}
    drawn = sampler_of(SamplingArgs(top_p=0.7, seed=list(range(1000))), 1000, 4)(logits).view(-1, 2)
    assert set(drawn[:, 0].tolist()) == {0, 1}
    share = (drawn[:, 0] == 0).float().mean().item()
    assert share == pytest.approx(0.5 / 0.8, abs=0.08)


def test_the_noise_is_exponential_and_its_draws_are_independent():
    noise = exponential(torch.arange(40), torch.arange(40) * 3, 5000).double()
    assert noise.mean().item() == pytest.approx(1, abs=0.01)
    assert noise.var().item() == pytest.approx(1, abs=0.03)
    ranked = (-noise).exp()  # uniform
    counts = torch.histc(ranked, 20, 0, 1) / noise.numel() * 20
    assert (counts - 1).abs().max() < 0.05
    rows = (ranked - 0.5) / ranked.std()
    for a, b in ((rows[:-1], rows[1:]), (rows[:, :-1], rows[:, 1:])):  # neighbouring seeds, neighbouring tokens
        assert (a * b).mean().abs() < 0.02
    steps = torch.stack([exponential(torch.tensor([7]), torch.tensor([n]), 5000)[0] for n in range(40)])
    assert (((-steps[:-1]).exp() - 0.5) * ((-steps[1:]).exp() - 0.5)).mean().abs() < 0.002


def test_sampling_with_a_seed_follows_the_probabilities():
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1])
    drawn = sampler_of(SamplingArgs(seed=list(range(4000))), 4000, 4)(probs.log().expand(4000, 4))
    share = torch.bincount(drawn, minlength=4) / 4000
    assert (share - probs).abs().max() < 0.03


def test_a_row_without_a_seed_beside_one_with_it_draws_at_random():
    logits = torch.zeros(2, 1000)
    sampler = sampler_of(SamplingArgs(seed=[7, None]), 2, 1000)
    runs = []
    for _ in range(3):
        sampler.assign({b: Request([0], sampling=SamplingArgs(seed=s)) for b, s in enumerate((7, None))})
        runs.append([sampler(logits).tolist() for _ in range(4)])
    assert len({tuple(step[0] for step in run) for run in runs}) == 1
    assert len({tuple(step[1] for step in run) for run in runs}) == 3


def test_repetition_penalty_against_a_loop_over_tokens():
    g = torch.Generator().manual_seed(3)
    penalties, prompts = [1.0, 1.3, 0.5], [[1, 2], [3, 3, 9], [4]]
    sampler = Sampler(3, 12, torch.device("cpu"))
    settings = [SamplingArgs(temperature=0, repetition_penalty=p) for p in penalties]
    sampler.assign({b: Request(prompts[b], sampling=settings[b]) for b in range(3)})
    texts = [list(p) for p in prompts]
    for step in range(30):
        if step == 12:  # another prompt takes the place of the second row
            texts[1] = [0, 5]
            sampler.assign({1: Request(texts[1], sampling=settings[1])})
        logits = torch.randn(3, 12, generator=g)
        drawing = torch.tensor([True, step % 3 != 1, True])
        token = sampler(logits, drawing).tolist()
        for b, text in enumerate(texts):
            expected = logits[b].clone()
            for t in set(text):
                expected[t] *= 1 / penalties[b] if expected[t] > 0 else penalties[b]
            assert token[b] == int(expected.argmax()), (step, b)
            if drawing[b]:
                text.append(token[b])


def test_a_stop_token_is_not_drawn_before_the_least_number_of_tokens():
    logits = torch.tensor([[0.0, 5.0, 1.0]]).expand(2, 3)
    sampler = Sampler(2, 3, torch.device("cpu"))
    greedy = SamplingArgs(temperature=0)
    sampler.assign({0: Request([0], 9, 2, greedy, [[1], [2, 1]]), 1: Request([0], 9, 0, greedy, [[1]])})
    assert [sampler(logits).tolist() for _ in range(3)] == [[2, 1], [2, 1], [1, 1]]
    sampler.assign({0: Request([0], 9, 0, greedy, [[1]]), 1: Request([0], 9, 1, greedy, [[1]])})
    assert [sampler(logits).tolist() for _ in range(2)] == [[1, 2], [1, 1]]


def test_logprobs_are_the_models_own():
    logits = torch.randn(3, 7)
    expected = logits.softmax(-1).log()
    token = torch.tensor([1, 6, 0])
    assert torch.allclose(logprobs_of(logits, token), expected[torch.arange(3), token], atol=1e-6)


def test_top_k_among_equals_does_not_hang_on_partners():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3000, generator=g).bfloat16()
    alone = sampler_of(SamplingArgs(top_k=50), 40, 3000).probabilities(logits) > 0
    assert (alone.sum(-1) == 50).all()
    ks = [50, 200, None, 1] * 10
    beside = sampler_of(SamplingArgs(top_k=ks), 40, 3000).probabilities(logits) > 0
    assert torch.equal(beside[::4], alone[::4])
    assert beside.sum(-1).tolist() == [3000 if k is None else k for k in ks]
    order = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :50]
    assert torch.equal(alone, torch.zeros_like(alone).scatter(-1, order, True)), "of equals the first"


def test_a_temperature_near_zero_is_greedy():
    logits = torch.randn(3, 50)
    for cold in (1e-40, 1e-7, 1e-5):
        assert torch.equal(sampler_of(SamplingArgs(temperature=cold, seed=1), 3, 50)(logits), logits.argmax(-1))


def test_the_ban_of_a_row_before_does_not_stay():
    logits = torch.tensor([[0.0, 5.0, 1.0]]).expand(2, 3)
    sampler, greedy = Sampler(2, 3, torch.device("cpu")), SamplingArgs(temperature=0)
    sampler.assign({b: Request([0], 9, 9, greedy, [[1]]) for b in range(2)})
    sampler.assign({0: Request([0], 9, 9, greedy)})
    assert sampler(logits).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_k": 1.5}, "top_k must be a whole number, got 1.5"),
        ({"seed": [1, "x"]}, "seed must be a whole number, got 'x'"),
        ({"seed": 2**64}, r"seed must be 0 to 2\*\*63 - 1"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty must be between 0.01 and 100"),
        ({"repetition_penalty": None}, "repetition_penalty must be a number, got None"),
    ],
)
def test_what_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        SamplingArgs(**given)


def test_min_p_keeps_what_has_a_share_of_the_most_probable():
    probs = torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.06, 0.04]])
    for min_p, kept in ((0.0, 6), (0.09, 6), (0.11, 5), (0.16, 4), (0.24, 4), (0.26, 3), (0.49, 3), (0.6, 1), (1.0, 1)):
        found = sampler_of(SamplingArgs(min_p=min_p), 1, 6).probabilities(probs.log())
        assert (found > 0).sum() == kept, min_p
        assert torch.allclose(found[0, :kept], probs[0, :kept], atol=1e-6), "what stays keeps its odds"


def test_min_p_comes_after_temperature_and_beside_top_p():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    hot = (logits / 2).softmax(-1)  # 0.36, 0.26, 0.20, 0.16: shares 1, 0.71, 0.55, 0.45
    args = SamplingArgs(temperature=2.0, min_p=0.5)
    assert (sampler_of(args, 1, 4).probabilities(logits) > 0).tolist() == [[True, True, True, False]]
    assert hot[0, 1] / hot[0, 0] == pytest.approx(0.5**0.5)
    both = SamplingArgs(min_p=0.25, top_p=0.6)
    assert (sampler_of(both, 1, 4).probabilities(logits) > 0).tolist() == [[True, True, False, False]]
    assert (sampler_of(SamplingArgs(min_p=0.4, top_k=2), 1, 4).probabilities(logits) > 0).sum() == 2


def test_min_p_of_a_row_does_not_hang_on_its_partners():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3000, generator=g)
    shares = [0.0, 0.05, 0.5, 1.0] * 10
    beside = sampler_of(SamplingArgs(min_p=shares), 40, 3000).probabilities(logits)
    for b, share in enumerate(shares):
        alone = sampler_of(SamplingArgs(min_p=share), 1, 3000).probabilities(logits[b : b + 1])
        assert torch.equal(beside[b : b + 1], alone)
        probs = logits[b].softmax(-1)
        assert torch.equal(alone[0] > 0, probs >= share * probs.max())
    drawn = sampler_of(SamplingArgs(min_p=1.0, seed=3), 40, 3000)(logits)
    assert torch.equal(drawn, logits.argmax(-1))


def test_seeds_go_on_from_the_last_to_the_first():
    assert SamplingArgs(seed=2**63 - 1).shifted(2).seed == 1
    assert SamplingArgs(seed=[5, None]).shifted(3).seed == [8, None]
    assert SamplingArgs(temperature=[None, 0.5]).resolved(0.7).temperature == [0.7, 0.5]

"""Continuous batching: a request gives the same tokens as its prompt alone, and does not change other rows."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from litgpt_kv import GPT, KVCache, KVCacheArgs, SamplingArgs, registry
from litgpt_kv.generate import Request, Stats, generate, serve, stream
from tests.oracle.reference import logits_of, tiny, tokens_of
from tests.oracle.strategies import FEW, plain

GREEDY = SamplingArgs(temperature=0)
STRATEGIES = [n for n in FEW if plain(n).needs <= {"keys"}]
ONE_LAYER = tiny(seed=5, n_layer=1)


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny(seed=5)


def args_of(name: str, budget: int = 12, **options) -> KVCacheArgs:
    return KVCacheArgs(name, budget if registry.get("strategy", name).evicts else None, **options)


def requests_of(count: int, seed: int = 0, **given) -> list[Request]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count, 2), generator=g).tolist()
    return [Request(tokens_of(b, n, 60), new, sampling=GREEDY, **given) for b, (n, new) in enumerate(lengths)]


def answers(steps) -> dict[int, tuple[list[int], str]]:
    return {row.index: (row.tokens, row.reason) for step in steps for row in step if row.reason}


@pytest.mark.parametrize("prefill", ["min-length", "full"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_forty_prompts_through_three_rows_equal_each_alone(model: GPT, name: str, prefill: str) -> None:
    requests = requests_of(40, stop=[[7], [3, 9]])
    cache = KVCache.build(model, args_of(name), 3, 70)
    found = answers(serve(model, requests, cache, prefill=prefill))
    assert sorted(found) == list(range(40)) and {reason for _, reason in found.values()} == {"stop", "length"}
    for b, request in enumerate(requests):
        alone = KVCache.build(model, args_of(name), 1, 70)
        (expected,) = generate(
            model,
            [request.prompt],
            alone,
            max_new_tokens=request.max_new_tokens,
            sampling=GREEDY,
            stop=request.stop,
            prefill=prefill,
        )
        assert found[b][0] == expected.tolist(), b


def test_without_a_cache(model: GPT) -> None:
    requests = requests_of(9)
    cached = answers(serve(model, requests, KVCache.build(model, "dense", 2, 70)))
    assert answers(serve(model, requests, None, rows=2)) == cached


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_fewer_requests_than_rows_and_none(model: GPT, rows: int) -> None:
    requests = requests_of(4)
    expected = answers(serve(model, requests, KVCache.build(model, "dense", 4, 70)))
    assert answers(serve(model, requests, KVCache.build(model, "dense", rows, 70))) == expected
    assert answers(serve(model, requests, None, rows=rows)) == expected
    with pytest.raises(ValueError, match="no prompts"):
        serve(model, [], KVCache.build(model, "dense", rows, 70))


def test_every_row_has_its_own_settings(model: GPT) -> None:
    settings = [
        SamplingArgs(t, k, p, seed, penalty)
        for seed, (t, k, p, penalty) in enumerate(
            [
                (0.0, None, 1.0, 1.0),
                (1.0, 5, 0.9, 1.2),
                (0.7, None, 0.8, 1.0),
                (2.0, 9, 1.0, 0.8),
                (1.0, None, 1.0, 1.5),
            ]
        )
    ]
    requests = [
        Request(tokens_of(n, 1 + 5 * (n % 4), 60), 5 + n, n % 3, settings[n % 5], [[n % 60], [4, 4]]) for n in range(20)
    ]
    stats = Stats()
    rows = {r.index: r for d in serve(model, requests, KVCache.build(model, "h2o", 3, 60), stats=stats, logprobs=True)
            for r in d}  # fmt: skip
    for n, request in enumerate(requests):
        alone = Stats()
        (expected,) = generate(
            model,
            [request.prompt],
            KVCache.build(model, "h2o", 1, 60),
            max_new_tokens=request.max_new_tokens,
            min_new_tokens=request.min_new_tokens,
            sampling=request.sampling,
            stop=request.stop,
            stats=alone,
            logprobs=True,
        )
        assert rows[n].tokens == expected.tolist(), n
        assert rows[n].logprobs == pytest.approx(alone.logprobs[0], abs=1e-5)
        assert rows[n].start_time <= rows[n].first_token_time <= rows[n].end_time
    assert stats.prompt_tokens == sum(len(r.prompt) for r in requests)
    assert stats.new_tokens >= sum(len(row.tokens) for row in rows.values())


def test_requests_are_taken_when_there_is_room(model: GPT) -> None:
    taken = []

    def endless():
        for n in range(10**9):
            taken.append(n)
            yield Request(tokens_of(n, 3, 60), 4, sampling=GREEDY)

    steps = serve(model, endless(), KVCache.build(model, "dense", 2, 20))
    for _ in range(4):
        next(steps)
    assert len(taken) == 2
    next(steps)
    assert len(taken) == 4


def test_what_does_not_fit_is_said(model: GPT) -> None:
    cache = KVCache.build(model, "dense", 1, 20)
    with pytest.raises(ValueError, match="Prompt 0 has 18 tokens; with 4 new ones it is over the limit of 20"):
        serve(model, [Request([1] * 18, 4)], cache)
    steps = serve(model, [Request([1], 1), Request([61], 1)], cache)
    next(steps)
    with pytest.raises(ValueError, match="Prompt 1 has a token outside the vocabulary of 61"):
        list(steps)
    with pytest.raises(ValueError, match="rows must be at least 1"):
        serve(model, [Request([1], 1)], None)
    list(stream(model, [[1, 2]], cache.repeat(1), max_new_tokens=3))
    with pytest.raises(ValueError, match="needs an empty cache"):
        serve(model, [Request([1], 1)], cache)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_conversation_goes_on_where_the_cache_stopped(model: GPT, name: str) -> None:
    """Two turns on one cache give the same as reading the whole text, and the second turn reads only new tokens."""
    first, second = [tokens_of(1, 9, 60), tokens_of(2, 15, 60)], [tokens_of(3, 8, 60), tokens_of(4, 3, 60)]
    cache = KVCache.build(model, args_of(name), 2, 70)
    replies = generate(model, first, cache, max_new_tokens=[6, 4], sampling=GREEDY)
    assert cache.seen == [14, 18]
    turn = [[row[-1].item(), *more] for row, more in zip(replies, second)]  # the last token was not read yet
    again = generate(model, turn, cache, max_new_tokens=5, sampling=GREEDY)
    for b in range(2):
        (row,) = logits_of(
            model,
            KVCache.build(model, args_of(name), 1, 70),
            [[*first[b], *replies[b].tolist(), *second[b], *again[b].tolist()]],
            [len(first[b])],
            "streamed",
        )
        begin = len(first[b]) + len(replies[b]) + len(second[b])
        assert [int(row[begin + i - 1].argmax()) for i in range(5)] == again[b].tolist()


SHAPES = dict(max_examples=500, deadline=None, derandomize=True, database=None)


@settings(**SHAPES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_random_admissions_steps_and_ends_equal_each_prompt_alone(data: st.DataObject) -> None:
    """Rows are admitted, stepped, retired, reset in any order; all logits of all rows equal the prompt alone."""
    model = ONE_LAYER
    name = data.draw(st.sampled_from(STRATEGIES))
    budget = data.draw(st.integers(3, 9))
    sinks, recent = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 2))
    keep = dict(sinks=sinks, recent=recent) if registry.get("strategy", name).evicts else {}
    args = args_of(name, budget, **keep, positions=data.draw(st.sampled_from(["absolute", "cache"])))
    size = data.draw(st.integers(1, 3))
    cache = KVCache.build(model, args, size, 40)
    rows: list[tuple[list[int], int, list[torch.Tensor]] | None] = [None] * size  # text, prompt length, logits
    done, seed = [], 0
    for _ in range(data.draw(st.integers(3, 14))):
        free = [b for b in range(size) if rows[b] is None]
        busy = [b for b in range(size) if rows[b] is not None]
        action = data.draw(
            st.sampled_from(["admit"] * 2 * bool(free) + ["step"] * 4 + ["finish", "reset"] * bool(busy))
        )
        if action == "admit":
            b, n, seed = data.draw(st.sampled_from(free)), data.draw(st.integers(1, 12)), seed + 1
            text = tokens_of(data.draw(st.integers(0, 99)), 40, 60)
            cache.reset([b])
            rows[b] = (text, n, [model(torch.tensor([text[:n]]), cache.row(b), torch.tensor([n]))[0]])
        elif action == "step" and busy:
            for _ in range(data.draw(st.integers(1, 4))):
                room = [b for b in busy if rows[b][1] + len(rows[b][2]) - 1 < 40]
                if len(room) < len(busy):
                    break
                text = [[r[0][r[1] + len(r[2]) - 1]] if (r := rows[b]) else [b] for b in range(size)]
                logits = model(torch.tensor(text), cache)[:, 0]
                for b in busy:
                    rows[b][2].append(logits[b].clone())
        elif action in ("finish", "reset") and busy:
            b = data.draw(st.sampled_from(busy))
            done.append(rows[b])
            rows[b] = None
            (cache.retire if action == "finish" else cache.reset)([b])
            if action == "reset":
                cache.retire([b])
        elif action == "step":
            continue
    for text, n, found in [*done, *[row for row in rows if row is not None]]:
        alone = KVCache.build(model, args, 1, 40)
        expected = [model(torch.tensor([text[:n]]), alone, torch.tensor([n]))[0]]
        while len(expected) < len(found):
            expected.append(model(torch.tensor([[text[n + len(expected) - 1]]]), alone)[0, 0])
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=1e-8)


def test_a_row_that_fills_the_context_without_a_cache(model: GPT) -> None:
    context = model.max_seq_length
    requests = [Request(tokens_of(n, context - 6 - 9 * n, 60), 7, sampling=GREEDY) for n in range(4)]
    cached = answers(serve(model, requests, KVCache.build(model, "dense", 2)))
    assert answers(serve(model, requests, None, rows=2)) == cached
    assert answers(serve(model, requests, None, rows=4)) == cached


def test_statistics_of_rows_that_come_and_go(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    now, passes = [0.0], []

    def timed(*args):
        """A clock that only the model moves: a second for a prompt, a thousandth for a decode step."""
        passes.append(len(args) == 3)
        now[0] += 1.0 if len(args) == 3 else 0.001
        return model(*args)

    timed.lm_head, timed.max_seq_length = model.lm_head, model.max_seq_length
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    requests, stats = requests_of(12), Stats()
    cache = KVCache.build(model, "dense", 3, 70)
    for _ in range(2):  # used again, they begin anew
        cache.reset()
        passes.clear()
        rows = {row.index: row for step in serve(timed, requests, cache, stats=stats) for row in step}
        assert stats.prompt_tokens == stats.prefill_tokens == sum(len(r.prompt) for r in requests)
        assert stats.new_tokens == sum(r.max_new_tokens for r in requests) == sum(len(r.tokens) for r in rows.values())
        assert stats.decode_tokens == stats.new_tokens - 12
        assert stats.prefill_seconds == pytest.approx(passes.count(True))
        assert stats.decode_seconds == pytest.approx(0.001 * passes.count(False))
    spent = [row.first_token_time - row.start_time for row in rows.values()]
    assert all(1 <= seconds <= 3 for seconds in spent), "from its admission to its first token: at most three prompts"


def test_long_first_prompts_are_read_in_blocks_beside_short_ones(model: GPT) -> None:
    calls = []

    def counting(*args):
        calls.append(tuple(args[0].shape))
        return model(*args)

    counting.lm_head, counting.max_seq_length = model.lm_head, model.max_seq_length
    requests = [Request(tokens_of(1, 80, 60), 2, sampling=GREEDY), Request(tokens_of(2, 2, 60), 2, sampling=GREEDY)]
    list(serve(counting, requests, KVCache.build(model, args_of("sink"), 2, 90)))
    assert len(calls) < 14, "80 tokens are ten blocks, not 80 steps"

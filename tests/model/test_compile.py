"""Decoding compiles to one graph for every strategy, and stays exact and guarded there."""

from __future__ import annotations

import pytest
import torch

from litgpt_kv import GPT, KVCache, KVCacheArgs, registry
from tests.oracle.reference import kept_of, logits_of, scores_of, tiny, tokens_of, walk
from tests.oracle.strategies import FEW, plain

C, STEPS = 8, 50
POSITIONS = ("absolute", "cache")
STRATEGIES = [n for n in FEW if plain(n).needs <= {"keys"}]  # the contract suite has every one
every = pytest.mark.parametrize("name", STRATEGIES)
at_both = pytest.mark.parametrize("positions", POSITIONS)


class Counting:
    """A backend that counts the graphs it is given; `inner` compiles them, None runs them as they are."""

    def __init__(self, inner: object = None) -> None:
        self.inner, self.graphs = inner, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> object:
        self.graphs += 1
        return graph.forward if self.inner is None else self.inner(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def build(model: GPT, name: str, positions: str, rows: int = 1, static: bool = True) -> KVCache:
    keep = dict(budget=C, sinks=1, recent=3) if registry.get("strategy", name).evicts else {}
    return KVCache.build(model, KVCacheArgs(name, positions=positions, **keep), batch_size=rows, static=static)


def compiled(model: GPT, inner: str | None = None) -> tuple[object, Counting]:
    counting = Counting(inner and torch._dynamo.lookup_backend(inner))
    return torch.compile(model, backend=counting, fullgraph=True), counting


def agree(model: GPT, name: str, positions: str, step: object, tol: float) -> None:
    """A ragged batch decoded eagerly and by `step` gives the same logits, kept tokens and ranks."""
    rows, prompts = [tokens_of(1, C - 3 + STEPS), tokens_of(2, C + 2 + STEPS)], [C - 3, C + 2]
    caches = [build(model, name, positions, 2, static) for static in (False, True)]
    eager = logits_of(model, caches[0], rows, prompts, "full")
    fast = logits_of(model, caches[1], rows, prompts, "full", step=step)
    for b in range(2):
        assert eager[b].keys() == fast[b].keys() and len(eager[b]) == STEPS + 1
        for i, logits in eager[b].items():
            torch.testing.assert_close(fast[b][i], logits, rtol=0, atol=tol)
        assert kept_of(caches[0], b) == kept_of(caches[1], b)
        for mine, theirs in zip(scores_of(caches[1], b), scores_of(caches[0], b)):
            assert [pytest.approx(head, rel=0, abs=tol) for head in theirs] == mine
    assert caches[0].pos.tolist() == caches[1].pos.tolist()


@every
@at_both
def test_fifty_steps_are_one_graph_and_equal_eager(name: str, positions: str) -> None:
    model = tiny(n_layer=2, sliding_window_size=6, sliding_window_indices=[1, 0])
    step, counting = compiled(model, "aot_eager")
    agree(model, name, positions, step, 1e-10)
    assert counting.graphs == 1


@pytest.mark.slow
@every
def test_inductor_equals_eager(name: str) -> None:
    model = tiny(n_layer=1)
    step, counting = compiled(model, "inductor")
    agree(model, name, registry.get("strategy", name).positions, step, 1e-9)
    assert counting.graphs == 1


@every
@torch.no_grad()
def test_one_graph_serves_other_caches_of_the_same_kind(gqa: GPT, name: str) -> None:
    step, counting = compiled(gqa)
    row = tokens_of(3, 20)
    for prompt in (4, C + 3, 1):
        found = logits_of(gqa, build(gqa, name, "absolute"), [row], [prompt], "full", step=step)[0]
        eager = logits_of(gqa, build(gqa, name, "absolute", static=False), [row], [prompt], "full")[0]
        for i, logits in eager.items():
            torch.testing.assert_close(found[i], logits, rtol=0, atol=1e-10)
    assert counting.graphs == 1


@every
@torch.no_grad()
def test_reset_and_a_new_prompt_need_no_new_graph(gqa: GPT, name: str) -> None:
    (step, counting), cache = compiled(gqa), build(gqa, name, "absolute", 2)
    rows, found = [tokens_of(4, 24), tokens_of(5, 24)], []
    for _ in range(2):
        found.append(logits_of(gqa, cache, rows, [5, C + 2], "full", step=step))
        cache.reset()
    assert counting.graphs == 1
    for b in range(2):
        assert all(torch.equal(found[0][b][i], found[1][b][i]) for i in found[0][b])


@every
def test_running_over_the_limit_raises(name: str) -> None:
    model = tiny(n_layer=1, block_size=16)
    (step, _), cache = compiled(model), build(model, name, "absolute", 2)
    rows = [tokens_of(6, 16), tokens_of(7, 14)]
    for _ in walk(model, cache, rows, [5, 3], "full", step=step):
        pass
    assert cache.limit == 16 and cache.pos.tolist() == [16, 14]
    with pytest.raises((RuntimeError, ValueError), match="over the limit of 16"):
        step(torch.tensor([[1], [2]]), cache)


@every
def test_a_row_retired_at_the_context_does_not_stop_the_others(name: str) -> None:
    model = tiny(n_layer=1, block_size=16)
    (step, counting), cache = compiled(model), build(model, name, "absolute", 2)
    rows = [tokens_of(6, 16), tokens_of(7, 14)]
    found = logits_of(model, cache, rows, [9, 3], "full", step=step)[1]
    (alone,) = logits_of(model, build(model, name, "absolute", static=False), rows[1:], [3], "full")
    assert cache.pos.tolist() == [16, 14] and counting.graphs == 1
    for i, logits in alone.items():
        torch.testing.assert_close(found[i], logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in STRATEGIES if registry.get("strategy", n).evicts])
def test_cache_positions_run_past_the_context(name: str) -> None:
    model = tiny(n_layer=1, block_size=16)
    (step, counting), row = compiled(model), tokens_of(8, 60)
    found = logits_of(model, build(model, name, "cache"), [row], [5], "full", step=step)[0]
    eager = logits_of(model, build(model, name, "cache", static=False), [row], [5], "full")[0]
    for i, logits in eager.items():
        torch.testing.assert_close(found[i], logits, rtol=0, atol=1e-10)
    assert counting.graphs == 1


@every
@at_both
@torch.no_grad()
def test_eager_and_compiled_steps_mix_on_one_cache(gqa: GPT, name: str, positions: str) -> None:
    (step, counting), rows = compiled(gqa), [tokens_of(b, 40) for b in (1, 2)]
    caches = [build(gqa, name, positions, 2, static) for static in (False, True)]
    prompts = [4, C + 1]
    eager = logits_of(gqa, caches[0], rows, prompts, "full")
    at = [n - 1 for n in prompts]
    gqa(torch.tensor([row[: max(prompts)] for row in rows]), caches[1], torch.tensor(prompts))
    for turn in range(25):
        at = [i + 1 for i in at]
        if turn == 20:
            caches[1].retire([1])
        call = step if turn % 7 in (2, 3, 5) else gqa
        logits = call(torch.tensor([[row[i]] for row, i in zip(rows, at)]), caches[1])[:, 0]
        torch.testing.assert_close(logits[0], eager[0][at[0]], rtol=0, atol=1e-10)
        if turn < 20:
            torch.testing.assert_close(logits[1], eager[1][at[1]], rtol=0, atol=1e-10)
    seen = [prompts[0] + 25, prompts[1] + 20]
    assert caches[1].pos.tolist() == seen == caches[1].seen and counting.graphs == 1
    # a row admitted while the host does not know the counters
    step(torch.tensor([[1], [1]]), caches[1])
    caches[1].reset([1])
    gqa(torch.tensor([rows[1][:6]]), caches[1].row(1), torch.tensor([6]))
    for i in range(6, 16):
        call = step if i % 3 else gqa
        last = call(torch.tensor([[1], [rows[1][i]]]), caches[1])[1, 0]
    alone = build(gqa, name, positions, static=False)
    torch.testing.assert_close(last, logits_of(gqa, alone, [rows[1][:16]], [6], "full")[0][15], rtol=0, atol=1e-10)
    assert caches[1].pos.tolist() == [seen[0] + 11, 16] == caches[1].seen


@torch.no_grad()
def test_compiled_prefill_and_training_equal_eager(gqa: GPT) -> None:
    idx = torch.tensor([tokens_of(b, 12) for b in (1, 2)])
    step = torch.compile(
        gqa, backend="eager"
    )  # prompts vary in length: graph breaks are allowed, wrong numbers are not
    torch.testing.assert_close(step(idx), gqa(idx), rtol=0, atol=1e-12)
    for name in STRATEGIES:
        caches = [build(gqa, name, "absolute", 2, static) for static in (False, True)]
        length = torch.tensor([12, 7])
        logits = [call(idx, cache, length) for call, cache in zip((gqa, step), caches)]
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-10)
        assert kept_of(caches[0], 1) == kept_of(caches[1], 1) and caches[1].pos.tolist() == [12, 7]

"""Continuations of contexts: against one pass of the full model, and against each pair alone, read by hand."""

from __future__ import annotations

import importlib
import itertools
import sys

import pytest
import torch

from litgpt_kv import LLM, KVCache, KVCacheArgs
from litgpt_kv.evaluate.continuations import Question, batches, questions_of, score
from litgpt_kv.generate import decode, prefill
from tests.oracle.reference import lift

TEXT = "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n"
CACHES = [
    KVCacheArgs("h2o", budget=6),
    KVCacheArgs("h2o", budget="50%"),
    KVCacheArgs("sink", budget=6),
    KVCacheArgs("keydiff", budget="40%", select="pool"),
    KVCacheArgs("keydiff", budget=7, select="model"),
    KVCacheArgs("dense", storage="int8"),
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    torch.set_num_threads(1)
    llm = LLM.load("demo", accelerator="cpu", precision="64-true")
    lift(llm.model)  # the angles, too
    return llm


@pytest.fixture(scope="module")
def pairs(llm: LLM) -> list[tuple[list[int], list[int]]]:
    """Of several lengths; the first three have one context, and the last two none."""
    ids = llm.encode_text(TEXT).tolist()
    with_context = [(12, ids[12:14]), (12, [5]), (12, ids[12:15]), (7, ids[7:16]), (9, [7])]
    return [(ids[:n], continuation) for n, continuation in [*with_context, (1, ids[1:10]), (1, [3, 4])]]


def alone(llm: LLM, context: list[int], continuation: list[int], args: KVCacheArgs, tokens: int) -> float:
    cache = KVCache.build(llm.model, args.resolved(tokens), 1, tokens)
    logits, total = prefill(llm.model, [context], cache, "full")[0], 0.0
    for at, token in enumerate(continuation):
        total += float(logits[0].log_softmax(-1)[token])
        if at < len(continuation) - 1:
            logits = decode(llm.model, torch.tensor([token]), cache)
    return total


def test_a_dense_cache_gives_what_one_pass_of_the_full_model_gives(llm: LLM, pairs: list) -> None:
    for size, (found, (context, continuation)) in itertools.product(
        (1, 3, 64), zip(score(llm, pairs, KVCacheArgs(), 3), pairs)
    ):
        logprobs = llm.model(torch.tensor([context + continuation]))[0, len(context) - 1 : -1].detach().log_softmax(-1)
        own = torch.tensor(continuation)
        assert found[0] == pytest.approx(float(logprobs.gather(1, own.unsqueeze(1)).sum()), abs=1e-8), size
        assert found[1] == bool((logprobs.argmax(-1) == own).all())


@pytest.mark.parametrize("args", CACHES, ids=lambda args: f"{args.strategy}-{args.budget}")
def test_a_pair_in_a_batch_gives_what_it_gives_alone(args: KVCacheArgs, llm: LLM, pairs: list) -> None:
    tokens = [14, 14, 14, 15, 9, 9, 2]  # of the context with its longest continuation
    expected = [alone(llm, *pair, args, n) for pair, n in zip(pairs, tokens)]
    done: list[int] = []
    found = score(llm, pairs, args, 4, on_batch=done.append)
    assert [logprob for logprob, _ in found] == pytest.approx(expected, abs=1e-8)
    assert sum(done) == len(pairs) and len(done) >= 3
    dense = [logprob for logprob, _ in score(llm, pairs, KVCacheArgs(), 64)]
    assert max(abs(a - b) for a, b in zip(expected, dense)) > 1e-4  # the cache matters


def test_greedy_continuations_are_known(llm: LLM) -> None:
    context = llm.encode(TEXT).tolist()
    args = KVCacheArgs("h2o", budget=6)
    new = llm.generate(TEXT, max_new_tokens=5, temperature=0.0, kv_cache=args, prefill="full", return_as_token_ids=True)
    (_, same), (_, other) = score(llm, [(context, new.tolist()), (context, [*new[:4].tolist(), 3])], args, 2)
    assert same and not other


def test_batches_have_one_budget_and_about_so_many_rows() -> None:
    pairs = [((1, 2), (3,)), ((1, 2), (4, 5)), ((1,), (2,)), ((1,), (3,)), ((7, 8, 9, 9), (1,))]
    questions = questions_of(pairs)
    assert questions == [
        Question((1, 2), [(3,), (4, 5)], [0, 1]),
        Question((1,), [(2,)], [2]),
        Question((1,), [(3,)], [3]),
        Question((7, 8, 9, 9), [(1,)], [4]),
    ]
    assert [question.tokens for question in questions] == [3, 1, 1, 4]
    assert [[q.numbers for q in batch] for batch, _ in batches(questions, KVCacheArgs(), 4)] == [
        [[4], [0, 1]],
        [[2], [3]],
    ]
    shares = batches(questions, KVCacheArgs("h2o", budget="50%"), 4)
    assert [([q.numbers for q in batch], args.budget) for batch, args in shares] == [
        ([[2], [3]], 1),
        ([[4], [0, 1]], 2),
    ]
    for pair in (((), (1,)), ((1,), ())):
        with pytest.raises(ValueError, match="Pair 0 has an empty"):
            questions_of([pair])


def test_without_the_extra_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it fails as where it is not installed
    monkeypatch.delitem(sys.modules, "litgpt_kv.evaluate.harness", raising=False)
    with pytest.raises(ImportError, match=r"needs lm_eval: pip install 'litgpt-kv\[eval\]'"):
        importlib.import_module("litgpt_kv.evaluate.harness")

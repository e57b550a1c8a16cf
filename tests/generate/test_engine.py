"""Requests are added and aborted at any time, and each row gives the same tokens as its prompt alone."""

from __future__ import annotations

import functools
import random

import pytest

from litgpt_kv import LLM, KVCache, KVCacheArgs, SamplingArgs, registry
from litgpt_kv.generate import Engine, Request, generate, serve
from tests.oracle.reference import kept_of, tiny, tokens_of
from tests.oracle.strategies import FEW

GREEDY = SamplingArgs(temperature=0)
STRATEGIES = FEW
MODEL = tiny(seed=5, n_layer=1)
BUDGET = 10


def args_of(name: str) -> KVCacheArgs:
    return KVCacheArgs(name, BUDGET if registry.get("strategy", name).evicts else None)


def cache_of(name: str, rows: int) -> KVCache:
    return KVCache.build(MODEL, args_of(name), rows, 60)


def request_of(kind: int) -> Request:
    """Return the request with a number, always the same one."""
    rng = random.Random(kind)
    sampling = GREEDY if kind % 3 else SamplingArgs(temperature=1.0, top_k=9, seed=kind, repetition_penalty=1.1)
    prompt = tokens_of(kind, rng.choice([1, 2, BUDGET - 1, BUDGET, BUDGET + 1, 17, 31]), 60)
    return Request(prompt, rng.randint(1, 12), rng.randint(0, 1), sampling, [[kind % 60], [4, 9]])


@functools.cache
def alone(name: str, prefill: str, kind: int) -> list[int]:
    """Return the answer to a request on its own cache."""
    r = request_of(kind)
    options = dict(max_new_tokens=r.max_new_tokens, min_new_tokens=r.min_new_tokens, sampling=r.sampling, stop=r.stop)
    return generate(MODEL, [r.prompt], cache_of(name, 1), prefill=prefill, **options)[0].tolist()


def finished(engine: Engine, most: int = 1000) -> dict[int, list[int]]:
    """Run the engine to the end; return the answers by id."""
    found: dict[int, list[int]] = {}
    for _ in range(most):
        if not engine.unfinished:
            return found
        found |= {o.id: o.sequence.tokens for o in engine.step() if o.finish_reason}
    pytest.fail("it does not end")


@pytest.mark.parametrize("part", range(5))
def test_five_hundred_random_orders_of_adds_aborts_and_steps(part: int) -> None:
    for trial in range(100 * part, 100 * part + 100):
        random_order(random.Random(trial))


def random_order(rng: random.Random) -> None:
    """Add, abort and step in random order: an answer equals its prompt alone, an aborted one is the start of it."""
    name, prefill = rng.choice(STRATEGIES), rng.choice(["min-length", "full"])
    cache = cache_of(name, rng.randint(1, 4)) if rng.random() < 0.9 else None
    rows, size = None if cache is not None else 2, rng.choice([1, 3, 7, 512])
    name = name if cache is not None else "dense"
    engine = Engine(MODEL, cache, rows=rows, prefill=prefill, pieces=rng.choice([1, 1, 2, None]), piece_size=size)
    kinds: dict[int, int] = {}
    found: dict[int, list[int]] = {}
    released: dict[int, list[int]] = {}
    aborted: set[int] = set()
    for _ in range(rng.randint(5, 40)):
        action = rng.random()
        if action < 0.3:
            kind, twin = rng.randrange(60), None
            for _ in range(rng.choice([1, 1, 1, 1, 3])):
                twin = engine.add(request_of(kind), same_prompt_as=twin)
                kinds[twin] = kind
        elif action < 0.4 and kinds:
            id = rng.choice(list(kinds))
            running = id not in found and id not in aborted
            assert engine.abort(id) == running
            aborted |= {id} if running else set()
        else:
            for output in engine.step():
                assert output.id not in aborted
                released.setdefault(output.id, []).extend(output.tokens)
                if output.finish_reason:
                    found[output.id] = output.sequence.tokens
    found |= finished(engine)
    assert engine.step() == []
    assert found.keys() == kinds.keys() - aborted
    for id, tokens in found.items():
        assert tokens == alone(name, prefill, kinds[id]), (id, kinds[id])
    for id in aborted & released.keys():
        expected = alone(name, prefill, kinds[id])
        assert released[id] == expected[: len(released[id])]


def test_a_step_reads_one_piece_and_decodes_once() -> None:
    calls: list[tuple[int, int]] = []

    def counting(*args):
        calls.append(tuple(args[0].shape))
        return MODEL(*args)

    counting.lm_head, counting.max_seq_length = MODEL.lm_head, MODEL.max_seq_length
    engine = Engine(counting, cache_of("sink", 3), decoder=MODEL)
    for seed, length in enumerate((4, 33, 5)):
        engine.add(Request(tokens_of(seed, length, 60), 20, sampling=GREEDY))
    outputs, pieces = [], []
    while not outputs or len(outputs[-1]) < 3:
        before = len(calls)
        outputs.append([output.id for output in engine.step()])
        pieces.append(calls[before:])
    first, block = BUDGET, cache_of("sink", 1).longest_block
    assert pieces[:3] == [[(1, 4)], [(1, first)], [(1, block)]], "a long prompt is read in pieces"
    assert all(len(step) <= 1 for step in pieces) and sum(t for ((_, t),) in pieces) == 4 + 33 + 5
    assert all(0 in ids for ids in outputs), "the first row waits for no one"
    calls.clear()
    assert [output.id for output in engine.step()] == [0, 1, 2] and calls == []


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_prompt_read_in_pieces_beside_others_equals_one_pass(name: str) -> None:
    calls: list[int] = []

    def counting(*args):
        calls.append(args[0].size(1))
        return MODEL(*args)

    counting.lm_head, counting.max_seq_length = MODEL.lm_head, MODEL.max_seq_length
    engine = Engine(counting, cache_of(name, 2), decoder=MODEL, prefill="full", piece_size=6)
    ids = [engine.add(Request(tokens_of(seed, n, 60), 14, sampling=GREEDY)) for seed, n in ((1, 4), (2, 45))]
    outputs = [[output.id for output in engine.step()] for _ in range(9)]
    assert calls == [4] + [6] * 7 + [3] and outputs == [[0]] * 8 + [[0, 1]], "one piece a step, and no one waits"
    found = finished(engine)
    for id, (seed, n) in zip(ids, ((1, 4), (2, 45))):
        (expected,) = generate(
            MODEL, [tokens_of(seed, n, 60)], cache_of(name, 1), max_new_tokens=14, sampling=GREEDY, prefill="full"
        )
        assert found[id] == expected.tolist()


def test_prompts_that_are_to_stay_have_lengths_of_their_own() -> None:
    args = KVCacheArgs("h2o", 16, recent=2, sinks=0, keep_prompt=True)
    cache = KVCache.build(MODEL, args, 2, 60)
    engine, prompts = Engine(MODEL, cache), [tokens_of(1, 3, 60), tokens_of(2, 13, 60)]
    for prompt in prompts:
        engine.add(Request(prompt, 20, sampling=GREEDY))
    with pytest.raises(ValueError, match=r"keep_prompt needs a budget of at least 17: prompt 14 . recent 2"):
        engine.add(Request(tokens_of(3, 14, 60), 20, sampling=GREEDY))
    found = finished(engine)
    for row, prompt in enumerate(prompts):
        for head in kept_of(cache, row)[0]:
            assert set(range(len(prompt))) <= set(head) and len(head) == 16
        (expected,) = generate(MODEL, [prompt], args, max_new_tokens=20, sampling=GREEDY)
        assert found[row] == expected.tolist()


@pytest.mark.parametrize("name", ["h2o", "snapkv", "dense"])
@pytest.mark.parametrize("prefill", ["min-length", "full"])
def test_answers_to_one_prompt_read_it_once(name: str, prefill: str) -> None:
    prompt = tokens_of(3, 17, 60)
    requests = [
        Request(
            prompt, 6, sampling=SamplingArgs(seed=s, repetition_penalty=1.2), prompt_logprobs=name == "h2o", logprobs=2
        )
        for s in range(5)
    ]
    engine = Engine(MODEL, cache_of(name, 3), prefill=prefill, piece_size=4)
    first = engine.add(requests[0])
    sequences = [engine.sequence(id) for id in [first, *(engine.add(r, same_prompt_as=first) for r in requests[1:])]]
    found = finished(engine)
    assert engine.stats.prompt_tokens == 2 * len(prompt)  # three rows at first, then two
    for id, request in enumerate(requests):
        own = Engine(MODEL, cache_of(name, 1), prefill=prefill, piece_size=4)
        alone = own.sequence(own.add(request))
        assert found[id] == finished(own)[0]
        assert sequences[id].logprobs == pytest.approx(alone.logprobs, abs=1e-6)  # kept in float32
        assert sequences[id].prompt_scores == alone.prompt_scores
    assert len({tuple(answer) for answer in found.values()}) > 1


@pytest.mark.parametrize("end", ["abort", "error"])
def test_if_the_one_that_reads_a_prompt_ends_another_one_reads_it(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(tokens_of(4, 17, 60), 5, sampling=GREEDY)
    engine = Engine(MODEL, cache_of("h2o", 4), prefill="full", piece_size=4)
    first = engine.add(request)
    others = [engine.add(request, same_prompt_as=first) for _ in range(3)]
    engine.step()
    assert [s.index for s in engine.scheduler.following] == others
    if end == "abort":
        engine.abort(first)
        engine.abort(others[1])
    else:
        monkeypatch.setattr(engine.runner, "read_piece", lambda sequences: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
        monkeypatch.undo()
    own = Engine(MODEL, cache_of("h2o", 1), prefill="full")
    alone = finished(own)[0] if own.add(request) == 0 else []
    assert finished(engine) == {id: alone for id in others if end == "error" or id != others[1]}
    assert engine.stats.prompt_tokens == 17 + 4  # the first one read one piece
    assert engine.scheduler.following == [] and engine.scheduler.rows == [None] * 4


def test_the_row_of_an_aborted_request_is_free_at_the_next_step() -> None:
    engine = Engine(MODEL, cache_of("h2o", 1))
    first, second = engine.add(request_of(40)), engine.add(request_of(41))
    engine.step()
    assert engine.unfinished == 2 and engine.free == 0
    assert engine.abort(first) and not engine.abort(first) and not engine.abort(99)
    outputs = engine.step()
    assert [output.id for output in outputs] == [second] and engine.free == 0
    assert finished(engine) == {second: alone("h2o", "min-length", 41)}
    third = engine.add(request_of(42))
    assert engine.abort(third) and engine.step() == [] and engine.unfinished == 0, "one that waits"


def test_requests_join_while_others_run() -> None:
    engine, found = Engine(MODEL, cache_of("window", 3)), {}
    for kind in range(20):
        engine.add(request_of(kind))
        found |= {o.id: o.sequence.tokens for o in engine.step() if o.finish_reason}
    found |= finished(engine)
    assert found == {kind: alone("window", "min-length", kind) for kind in range(20)}


def test_ids() -> None:
    engine = Engine(MODEL, cache_of("dense", 2))
    assert engine.add(Request([1], 2, id=7)) == 7 and engine.add(Request([1], 2)) == 8
    with pytest.raises(ValueError, match="The id 7 is in use"):
        engine.add(Request([1], 2, id=7))
    finished(engine)
    assert engine.add(Request([1], 2, id=7)) == 7


class Queue:
    """An iterator that is sometimes empty, like a queue."""

    def __init__(self, pattern: list[Request | None]) -> None:
        self.pattern = list(pattern)

    def __iter__(self) -> Queue:
        return self

    def __next__(self) -> Request:
        if not self.pattern or (request := self.pattern.pop(0)) is None:
            raise StopIteration
        return request


def test_a_row_that_found_nothing_to_do_is_offered_work_again() -> None:
    prompt = tokens_of(1, 3, 60)
    long, short = Request(prompt, 30, sampling=GREEDY), Request(prompt, 2, sampling=GREEDY)
    queue = Queue([long, short, None, None, None, short, None, short, None])
    ended = {}
    for step in serve(MODEL, queue, cache_of("dense", 2)):
        ended |= {row.index: [r.index for r in step] for row in step if row.reason}
    assert ended.keys() == {0, 1, 2, 3} and not queue.pattern
    assert all(0 in ended[n] for n in (1, 2, 3)), "they were answered beside the long one"


@pytest.mark.parametrize("failing", ["decode", "prompt", "block", "draw"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_a_pass_that_breaks_off_ends_its_requests_and_no_others(failing: str, error: type[BaseException]) -> None:
    broken: list[str] = []

    def model(*args):
        kind = "prompt" if len(args) == 3 else "block" if args[0].size(1) > 1 else "decode"
        if kind in broken:
            broken.remove(kind)
            raise error("no more")
        return MODEL(*args)

    model.lm_head, model.max_seq_length = MODEL.lm_head, MODEL.max_seq_length
    kinds = [k for k in range(300) if len(request_of(k).prompt) == 31 and request_of(k).max_new_tokens > 8][:3]
    engine = Engine(model, cache_of("sink", 2))
    for kind in kinds:
        engine.add(request_of(kind))
    sampler, found = engine.sampler, {}

    def failing_sampler(*args):
        engine.sampler = sampler
        raise error("no more")

    for step in range(9):
        if step == {"prompt": 0, "block": 1}.get(failing, 8):
            engine.sampler = failing_sampler if failing == "draw" else sampler
            broken.append(failing)
            running = {sequence.index for sequence in engine.scheduler.running()}
            lost = running if failing in ("decode", "draw") else {0}
            with pytest.raises(error, match="no more"):
                engine.step()
        found |= {o.id: o.sequence.tokens for o in engine.step() if o.finish_reason}
    found |= finished(engine)
    assert lost and found.keys() == {0, 1, 2} - lost, "all that took part in the pass, and no others"
    for id, tokens in found.items():
        assert tokens == alone("sink", "min-length", kinds[id])
    again = engine.add(request_of(kinds[0]))
    assert finished(engine)[again] == alone("sink", "min-length", kinds[0]), "the engine works as before"


def test_a_request_goes_on_in_the_row_that_it_names() -> None:
    first, second = tokens_of(1, 9, 60), tokens_of(2, 15, 60)
    for name in STRATEGIES:
        cache = cache_of(name, 2)
        engine = Engine(MODEL, cache)
        id = engine.add(Request(first, 4, sampling=GREEDY), row=1)
        made = finished(engine)[id]
        engine.add(Request(tokens_of(3, 5, 60), 9, sampling=GREEDY))  # in the other row
        later = engine.add(Request([made[-1], *second], 6, sampling=GREEDY), row=1)
        found = finished(engine)[later]
        assert cache.seen[1] == 9 + 3 + 16 + 5
        own = cache_of(name, 1)
        generate(MODEL, [first], own, max_new_tokens=4, sampling=GREEDY)
        (expected,) = generate(MODEL, [[made[-1], *second]], own, max_new_tokens=6, sampling=GREEDY)
        assert found == expected.tolist(), name


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (dict(cache="dense"), ValueError, "cache must be a KVCache or None, got 'dense'"),
        (dict(rows=3), ValueError, "rows must be at least 1, and the cache's batch size"),
        (dict(cache=None), ValueError, "rows must be at least 1"),
        (dict(pieces=0), ValueError, "pieces must be at least 1, or None for all, got 0"),
        (dict(prefill="left"), ValueError, "prefill must be one of min-length, full, got 'left'"),
        (dict(prefill_chunk=11), ValueError, "prefill_chunk must be 1 to 10"),
        (dict(piece_size=0), ValueError, "piece_size must be"),
    ],
)
def test_what_an_engine_refuses(given: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Engine(MODEL, **{"cache": cache_of("window", 2), **given})


def test_another_prompt_is_not_read_with_one() -> None:
    engine = Engine(MODEL, cache_of("dense", 2))
    first = engine.add(Request([1, 2, 3]))
    with pytest.raises(ValueError, match=f"does not begin as request {first} does"):
        engine.add(Request([1, 2, 4]), same_prompt_as=first)
    with pytest.raises(TypeError, match="same_prompt_as must be the id of a request"):
        engine.add(Request([1, 2, 3]), same_prompt_as="first")  # type: ignore[arg-type]
    assert engine.unfinished == 1
    assert engine.add(Request([1, 2, 4]), same_prompt_as=99) == 1  # it has ended: the prompt is read


def test_what_add_refuses_changes_nothing() -> None:
    engine = Engine(MODEL, cache_of("dense", 2))
    id = engine.add(request_of(3))
    for request, row, error, says in (
        ([1, 2], None, TypeError, r"request must be a Request, got \[1, 2\]"),
        (Request([], 2), None, ValueError, "Prompt 1 must be a list of at least one token"),
        (Request([61], 2), None, ValueError, "Prompt 1 has a token outside the vocabulary of 61"),
        (Request([1] * 59, 3), None, ValueError, "Prompt 1 has 59 tokens; with 3 new ones it is over the limit of 60"),
        (Request([1], 3, past=[99]), None, ValueError, "The text before prompt 1 has a token outside"),
        (Request([1], 3), 2, ValueError, "row must be 0 to 1, got 2"),
        (Request([1], 3), True, ValueError, "row must be 0 to 1, got True"),
    ):
        with pytest.raises(error, match=says):
            engine.add(request, row)
    assert finished(engine) == {id: alone("dense", "min-length", 3)}


def test_two_streams_of_one_llm_have_statistics_of_their_own() -> None:
    llm = LLM.load("demo", accelerator="cpu")
    settings = dict(temperature=0.0, stream=True)
    expected = [llm.generate(text, max_new_tokens=n, temperature=0.0) for text, n in (("def f(x):", 5), ("import", 9))]
    first = llm.generate("def f(x):", max_new_tokens=5, **settings)
    second = llm.generate(["import"], max_new_tokens=9, kv_cache="window", **settings)
    texts = ["", ""]
    for _ in range(5):
        texts[0] += next(first)
        texts[1] += next(second)[0]
    texts[1] += "".join(step[0] for step in second)
    assert list(first) == [] and texts == expected
    assert (first.stats.new_tokens, second.stats.new_tokens) == (5, 9)
    assert first.stats.prompt_tokens == len(llm.encode("def f(x):")) and first.stats.reasons == ["length"]
    assert second.stats.prompt_tokens == len(llm.encode("import"))
    assert first.cache is not second.cache and second.cache.args.strategy == "window"
    assert llm.stats is first.stats and llm.cache is first.cache, "the last run that ended"

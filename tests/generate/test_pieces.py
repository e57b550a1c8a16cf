"""The cache under an engine: prompts in pieces, kept prompts, static mode, and interrupted steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from litgpt_kv import KVCache, KVCacheArgs, SamplingArgs
from litgpt_kv.generate import Engine, Request, generate, prefill, stream
from tests.oracle.reference import kept_of, tiny, tokens_of

GREEDY = SamplingArgs(temperature=0)
MODEL = tiny(seed=6)
H2O = KVCacheArgs("h2o", budget=12, sinks=1, recent=3)


def answer_alone(args: KVCacheArgs, prompt: list[int], new: int, method: str = "full") -> list[int]:
    cache = KVCache.build(MODEL, args, 1, 96)
    return generate(MODEL, [prompt], cache, max_new_tokens=new, sampling=GREEDY, prefill=method)[0].tolist()


# -- pieces of prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "min-length"])
@pytest.mark.parametrize("size", [1, 7, 512])
def test_a_prompt_in_pieces_gives_what_one_pass_gives_while_others_go_on(size: int, method: str) -> None:
    first, long = tokens_of(1, 5, 60), tokens_of(2, 60, 60)
    drawn: list[Tensor] = []
    cache = KVCache.build(MODEL, H2O, 2, 96)
    engine = Engine(MODEL, cache, prefill=method, piece_size=size)
    draw = engine.sampler

    def watched(logits: Tensor, drawing: Tensor | None = None) -> Tensor:
        if drawing is None or drawing[1]:
            drawn.append(logits[1].clone())
        return draw(logits, drawing)

    watched.assign = draw.assign
    engine.sampler = watched
    engine.add(Request(first, 80, sampling=GREEDY))
    while not any(output.id == 0 for output in engine.step()):
        pass
    engine.add(Request(long, 9, sampling=GREEDY))
    waited, done, found = 0, {}, {}
    while engine.unfinished:
        outputs = {output.id: output for output in engine.step()}
        if 1 not in found and 1 not in outputs:
            waited += 1
            assert list(outputs) == [0], "the other row draws a token at every step"
        found |= outputs
        done |= {id: output.sequence.tokens for id, output in outputs.items() if output.finish_reason}
    pieces = -(-(60 if method == "full" else 12) // size)
    assert waited == pieces - 1 + (48 if method == "min-length" else 0)
    assert done == {0: answer_alone(H2O, first, 80, method), 1: answer_alone(H2O, long, 9, method)}
    whole = KVCache.build(MODEL, H2O, 1, 96)
    if method == "full":
        logits, _ = prefill(MODEL, [long], whole, "full")
        torch.testing.assert_close(drawn[0], logits[0], rtol=0, atol=1e-10)
    for token, found_logits in zip(done[1] if method == "full" else [], drawn[1:]):
        torch.testing.assert_close(found_logits, MODEL(torch.tensor([[token]]), whole)[0, 0], rtol=0, atol=1e-10)


def test_an_aborted_prompt_in_pieces_leaves_its_row_to_the_next_one() -> None:
    engine = Engine(MODEL, KVCache.build(MODEL, H2O, 1, 96), prefill="full", piece_size=7)
    engine.add(Request(tokens_of(1, 40, 60), 4, sampling=GREEDY))
    engine.step()
    assert engine.abort(0)
    prompt, found = tokens_of(3, 30, 60), []
    engine.add(Request(prompt, 6, sampling=GREEDY))
    while engine.unfinished:
        found += [token for output in engine.step() for token in output.tokens]
    assert found == answer_alone(H2O, prompt, 6)


@pytest.mark.parametrize("chunk", [7, 40, 500])
def test_a_full_prefill_in_chunks_gives_what_one_pass_gives(chunk: int) -> None:
    prompts = [tokens_of(b, n, 60) for b, n in enumerate((40, 40, 9))]
    sizes: list[int] = []

    def watched(tokens: Tensor, *rest: object) -> Tensor:
        sizes.append(tokens.size(1))
        return MODEL(tokens, *rest)

    watched.lm_head, watched.max_seq_length = MODEL.lm_head, MODEL.max_seq_length
    options = dict(max_new_tokens=12, sampling=GREEDY, prefill="full")
    found = generate(watched, prompts, KVCache.build(MODEL, H2O, 3, 96), prefill_chunk=chunk, **options)
    whole = generate(MODEL, prompts, KVCache.build(MODEL, H2O, 3, 96), **options)
    assert [row.tolist() for row in found] == [row.tolist() for row in whole]
    assert max(sizes) == min(chunk, 40)
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1, got 0"):
        generate(MODEL, prompts, KVCache.build(MODEL, H2O, 3, 96), prefill_chunk=0, **options)


# -- kept prompts ------------------------------------------------------------------------------------------------------

KEPT = KVCacheArgs("h2o", budget=12, sinks=0, recent=2, keep_prompt=True)


@pytest.mark.parametrize("method", ["full", "min-length"])
def test_a_prompt_that_cannot_be_kept_is_refused_at_the_door(method: str) -> None:
    cache = KVCache.build(MODEL, KEPT, 2, 96)
    engine = Engine(MODEL, cache, prefill=method)
    engine.add(Request(tokens_of(1, 9, 60), 20, sampling=GREEDY))
    engine.step()
    says = r"Prompt 1 does not fit: keep_prompt needs a budget of at least 13: prompt 10 \+ recent 2 \+ interval 1"
    with pytest.raises(ValueError, match=says):
        engine.add(Request(tokens_of(2, 10, 60), 20, sampling=GREEDY))
    engine.add(Request(tokens_of(3, 4, 60), 20, sampling=GREEDY))
    while engine.unfinished:
        engine.step()
    for row, length in enumerate((9, 4)):
        assert all(set(range(length)) <= set(head) for heads in kept_of(cache, row) for head in heads)


def test_prefill_and_stream_keep_prompts_too() -> None:
    prompts = [tokens_of(1, 9, 60), tokens_of(3, 4, 60)]
    for method in ("full", "min-length"):
        cache = KVCache.build(MODEL, KEPT, 2, 96)
        generate(MODEL, prompts, cache, max_new_tokens=20, sampling=GREEDY, prefill=method)
        for row, prompt in enumerate(prompts):
            kept = [set(head) for heads in kept_of(cache, row) for head in heads]
            assert all(set(range(len(prompt))) <= head for head in kept), method
        with pytest.raises(ValueError, match="keep_prompt needs a budget of at least 13"):
            prefill(MODEL, [tokens_of(2, 10, 60)], KVCache.build(MODEL, KEPT, 1, 96), method)
        with pytest.raises(ValueError, match="Prompt 0 does not fit: keep_prompt needs a budget of at least 13"):
            generate(MODEL, [tokens_of(2, 10, 60)], KEPT, max_new_tokens=2, prefill=method)


# -- static mode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [H2O, KVCacheArgs("dense"), KVCacheArgs("window", budget=9)], ids=lambda a: a.strategy)
def test_a_decoder_finds_a_static_cache_that_says_whether_a_row_is_full(args: KVCacheArgs) -> None:
    steps: list[tuple[bool, bool]] = []
    cache = KVCache.build(MODEL, args, 2, 96)

    def decoder(token: Tensor, given: KVCache) -> Tensor:
        budget = given.args.budget or 1000
        live = [n for n, alive in zip(given.seen, given.live.tolist()) if alive]
        steps.append((given.static and given.evicting, max(live) >= budget))
        return MODEL(token, given)

    prompts = [tokens_of(1, 3, 60), tokens_of(2, 5, 60)]
    found = generate(MODEL, prompts, cache, max_new_tokens=[14, 4], sampling=GREEDY, decoder=decoder)
    assert [row.tolist() for row in found] == [answer_alone(args, p, n) for p, n in zip(prompts, (14, 4))]
    assert all(evicting == full for evicting, full in steps)
    assert {full for _, full in steps} == ({False} if args.strategy == "dense" else {False, True})
    assert cache.static and cache.evicting, "whoever uses it next finds what is always right"


# -- interrupted steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("call", [0, 1, 4])
def test_a_stream_that_was_interrupted_in_a_step_leaves_a_cache_that_says_so(call: int, static: bool) -> None:
    prompts = [tokens_of(1, 6, 60), tokens_of(2, 6, 60)]
    options = dict(max_new_tokens=8, sampling=GREEDY, decoder=(lambda *args: MODEL(*args)) if static else None)
    cache, calls = KVCache.build(MODEL, H2O, 2, 96), []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == call + 1:
            raise KeyboardInterrupt

    hook = MODEL.transformer.h[1].mlp.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(stream(MODEL, prompts, cache, **options))
        for again in (stream, generate):
            with pytest.raises(ValueError, match=r"cannot go on: Row 0 is in the middle of a step.*reset\(\)"):
                again(MODEL, prompts, cache, **options)
    finally:
        hook.remove()
    cache.reset()
    found = generate(MODEL, prompts, cache, **options)
    assert [row.tolist() for row in found] == [answer_alone(H2O, prompt, 8) for prompt in prompts]

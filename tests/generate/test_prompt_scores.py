"""What requests may ask of the engine besides tokens: scores of prompts, likely alternatives, states to go on from."""

from __future__ import annotations

import pytest
import torch

from litgpt_kv import GPT, KVCache, KVCacheArgs, SamplingArgs
from litgpt_kv.generate import Engine, Request, generate
from litgpt_kv.generate.sampling import Sampler
from tests.oracle.reference import tiny

GREEDY = SamplingArgs(temperature=0)
PROMPT = [3, 9, 27, 14, 42, 1, 3, 9, 27, 14, 42, 1, 5, 6, 7, 8, 9, 10, 11, 12]
ARGS = [KVCacheArgs("dense"), KVCacheArgs("h2o", budget=12), KVCacheArgs("window", budget=9)]


def finished(engine: Engine, request: Request, **where):
    sequence = engine.sequence(engine.add(request, **where))
    while engine.unfinished:
        engine.step()
    return sequence


@torch.inference_mode()
def reference(model: GPT, args: KVCacheArgs, tokens: list[int], full: bool) -> list[torch.Tensor]:
    """Log-probabilities (V,) after each token but the last: a first pass, then token by token."""
    cache = KVCache.build(model, args, 1, 60)
    first = len(PROMPT) if full else min(len(PROMPT), cache.first_chunk)
    logits = list(model(torch.tensor([tokens[:first]]))[0])
    model(torch.tensor([tokens[:first]]), cache, torch.tensor([first]))
    logits += [model(torch.tensor([[token]]), cache)[0, 0] for token in tokens[first:-1]]
    return [x.log_softmax(-1) for x in logits]


@pytest.mark.parametrize("prefill", ["min-length", "full"])
@pytest.mark.parametrize("args", ARGS, ids=lambda args: args.strategy)
@pytest.mark.parametrize("piece_size", [5, 512])
def test_scores_of_a_prompt_and_alternatives(gqa: GPT, args: KVCacheArgs, prefill: str, piece_size: int) -> None:
    engine = Engine(gqa, KVCache.build(gqa, args, 2, 60), prefill=prefill, piece_size=piece_size)
    engine.add(Request([1, 2, 3], 30, sampling=GREEDY))  # a neighbour that asks for nothing
    engine.step()
    sequence = finished(engine, Request(PROMPT, 5, sampling=GREEDY, logprobs=3, prompt_logprobs=True))
    expected = reference(gqa, args, [*PROMPT, *sequence.tokens], prefill == "full")
    found = [*sequence.prompt_scores, *zip(sequence.logprobs, sequence.top_logprobs)]
    assert len(found) == len(PROMPT) - 1 + 5
    for (odds, top), log_p, token in zip(found, expected, [*PROMPT, *sequence.tokens][1:]):
        assert odds == pytest.approx(log_p[token].item(), abs=1e-6)  # float32 by its contract
        values, tokens = log_p.topk(3)
        assert [token for token, _ in top] == tokens.tolist()
        assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-6)


def test_a_window_shorter_than_the_prompt_scores_what_a_pass_without_a_cache_gives() -> None:
    model = tiny(sliding_window_size=6, sliding_window_indices=[1, 0])
    engine = Engine(model, KVCache.build(model, "dense", 1, 60), prefill="full")
    sequence = finished(engine, Request(PROMPT, 1, sampling=GREEDY, prompt_logprobs=True))
    log_p = model(torch.tensor([PROMPT]))[0].log_softmax(-1)
    expected = [log_p[at, token].item() for at, token in enumerate(PROMPT[1:])]
    assert [odds for odds, _ in sequence.prompt_scores] == pytest.approx(expected, abs=1e-6)


def test_without_a_cache_prompts_are_scored_too(gqa: GPT) -> None:
    engine = Engine(gqa, None, rows=1)
    sequence = finished(engine, Request(PROMPT, 1, sampling=GREEDY, logprobs=0, prompt_logprobs=True))
    log_p = gqa(torch.tensor([PROMPT]))[0].log_softmax(-1)
    expected = [log_p[at, token].item() for at, token in enumerate(PROMPT[1:])]
    assert [odds for odds, _ in sequence.prompt_scores] == pytest.approx(expected, abs=1e-6)
    assert sequence.top_logprobs == [] and len(sequence.logprobs) == 1


@pytest.mark.parametrize("args", ARGS, ids=lambda args: args.strategy)
def test_a_copied_state_goes_on_in_any_row_as_its_own_row_does(gqa: GPT, args: KVCacheArgs) -> None:
    engine = Engine(gqa, KVCache.build(gqa, args, 3, 60))
    before = finished(engine, Request(PROMPT, 6, sampling=GREEDY))
    state, later = engine.copy_of(before), Request([before.last, 3, 4, 5], 6, sampling=GREEDY)
    expected = finished(engine, later, row=before.row)
    for _ in range(3):  # others take the rows, and leave something in them
        engine.add(Request([1, 2, 3, 4], 9, sampling=GREEDY))
    engine.step()
    for _ in range(2):  # a state serves more than once
        sequence = finished(engine, later, state=state)
        assert sequence.tokens == expected.tokens
    assert state.seen == [len(PROMPT) + 5]


def test_what_is_no_state_is_refused(gqa: GPT, mha: GPT) -> None:
    engine = Engine(gqa, KVCache.build(gqa, "h2o", 2, 60))
    ended = finished(engine, Request(PROMPT, 2, sampling=GREEDY))
    state = engine.copy_of(ended)
    with pytest.raises(ValueError, match="not with both"):
        engine.add(Request([1], 2), row=0, state=state)
    with pytest.raises(ValueError, match="one row that has seen tokens"):
        engine.add(Request([1], 2), state=KVCache.build(gqa, "h2o", 2, 60))
    with pytest.raises(ValueError, match="over the limit of"):
        engine.add(Request([1] * 20, 5000), state=state)
    with pytest.raises(ValueError, match="no state to go on with"):
        Engine(gqa, None, rows=1).add(Request([1], 2), state=state)
    with pytest.raises(ValueError, match="nothing to copy"):
        Engine(gqa, None, rows=1).copy_of(ended)
    cache = KVCache.build(gqa, KVCacheArgs("h2o", budget=7), 2, 60)
    with pytest.raises(ValueError, match="same settings"):
        cache.restore(0, state)
    with pytest.raises(ValueError, match="same model"):
        KVCache.build(mha, "h2o", 2, 60).restore(0, state)


@pytest.mark.parametrize(("frequency", "presence"), [(0.7, 0.0), (0.0, 1.1), (-0.5, 0.3)])
def test_penalties_of_the_new_text(frequency: float, presence: float) -> None:
    """Logits less `frequency` times a token's count, less `presence` if it is there; the prompt does not count."""
    args = [SamplingArgs(temperature=0, frequency_penalty=frequency, presence_penalty=presence), GREEDY]
    sampler = Sampler(2, 6, torch.device("cpu"))
    sampler.assign({row: Request([0, 1, 2], sampling=own) for row, own in enumerate(args)})
    torch.manual_seed(0)
    logits, counts = torch.randn(2, 6, dtype=torch.float64), [0] * 6
    for _ in range(12):
        expected = [v - frequency * n - presence * (n > 0) for v, n in zip(logits[0].tolist(), counts)]
        drawn = sampler(logits).tolist()
        assert drawn == [expected.index(max(expected)), logits[1].argmax().item()]
        counts[drawn[0]] += 1
    sampler.assign({0: Request([0], sampling=args[0])})  # a new request starts at zero
    assert sampler(logits).tolist() == logits.argmax(-1).tolist()


def test_a_row_with_penalties_changes_no_other(gqa: GPT) -> None:
    own = SamplingArgs(temperature=0.9, seed=3)
    other = SamplingArgs(temperature=0.9, seed=4, frequency_penalty=1.0, presence_penalty=0.5, repetition_penalty=1.3)
    both = generate(gqa, [PROMPT, PROMPT[:7]], "h2o", max_new_tokens=20, sampling=pair(own, other))
    assert both[0].tolist() == generate(gqa, [PROMPT], "h2o", max_new_tokens=20, sampling=own)[0].tolist()
    assert both[1].tolist() == generate(gqa, [PROMPT[:7]], "h2o", max_new_tokens=20, sampling=other)[0].tolist()


def pair(one: SamplingArgs, two: SamplingArgs) -> SamplingArgs:
    return SamplingArgs(**{name: [getattr(one, name), getattr(two, name)] for name in vars(one)})

"""Generation: ragged batches equal each prompt alone, stopping, sampling, statistics, what is refused."""

import pytest
import torch

import litgpt.generate.base as litgpt_generate
from litgpt.model import GPT as LitGPT
from litgpt_kv import GPT, KVCache, KVCacheArgs, SamplingArgs, registry
from litgpt_kv.generate import Stats, decode, generate, prefill, stream
from tests.oracle.strategies import FEW

GREEDY = SamplingArgs(temperature=0)
LENGTHS = (1, 4, 11, 12, 13, 36)  # 1, sinks, budget - 1, budget, budget + 1, three budgets


def args_of(name, **options):
    budget = 12 if registry.get("strategy", name).evicts else None
    return KVCacheArgs(strategy=name, budget=budget, **options)


@pytest.fixture(scope="module")
def model(request):
    from litgpt.config import Config

    config = Config(
        name="generate-tests",
        block_size=96,
        n_layer=2,
        n_embd=32,
        n_head=4,
        n_query_groups=2,
        head_size=8,
        intermediate_size=48,
        padded_vocab_size=61,
        vocab_size=61,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    torch.manual_seed(5)
    model = GPT(config)
    with torch.no_grad():  # far from ties: greedy tokens must not hang on the last bit
        for p in model.parameters():
            p.mul_(3 if p.dim() > 1 else 1)
    return model.eval()


@pytest.fixture(scope="module")
def prompts():
    g = torch.Generator().manual_seed(1)
    return [torch.randint(61, (n,), generator=g) for n in LENGTHS]


@pytest.mark.parametrize("method", ["min-length", "full"])
@pytest.mark.parametrize("name", FEW)
def test_ragged_batch_equals_each_prompt_alone(model, prompts, name, method):
    kv = args_of(name)
    together = generate(model, prompts, kv, max_new_tokens=25, sampling=GREEDY, prefill=method)
    for row, prompt in zip(together, prompts):
        (alone,) = generate(model, [prompt], kv, max_new_tokens=25, sampling=GREEDY, prefill=method)
        assert len(alone) == 25
        assert torch.equal(row, alone)


def test_dense_equals_recomputing_without_a_cache(model, prompts):
    cached = generate(model, prompts, max_new_tokens=20, sampling=GREEDY)
    plain = [[] for _ in prompts]
    for step in stream(model, prompts, None, max_new_tokens=20, sampling=GREEDY):
        for row, tokens in zip(plain, step):
            row += tokens
    assert [row.tolist() for row in cached] == plain


def test_the_same_tokens_as_litgpt_with_its_own_cache(model, prompts):
    """Greedy, and sampled with a seed: temperature, top-k and top-p mean what they mean in litgpt."""
    other = LitGPT(model.config).eval()
    other.load_state_dict(model.state_dict())
    for settings in (
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_k": 1},
    ):
        prompt = prompts[3]
        other.set_kv_cache(1)
        torch.manual_seed(11)
        expected = litgpt_generate.generate(other, prompt, len(prompt) + 30, include_prompt=False, **settings)
        torch.manual_seed(11)
        (found,) = generate(model, [prompt], max_new_tokens=30, sampling=SamplingArgs(**settings))
        assert found.tolist() == expected.tolist(), settings


def test_a_seed_repeats_a_run_and_another_does_not(model, prompts):
    runs = [
        generate(model, prompts, max_new_tokens=12, sampling=SamplingArgs(temperature=1.0, seed=seed))
        for seed in (3, 3, 4)
    ]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1]))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2]))


def test_a_row_stops_at_its_token_without_touching_the_others(model, prompts):
    free = [row.tolist() for row in generate(model, prompts, args_of("h2o"), max_new_tokens=25, sampling=GREEDY)]
    stop = free[0][6]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    stats = Stats()
    rows = generate(model, prompts, args_of("h2o"), max_new_tokens=25, sampling=GREEDY, stop=[[stop]], stats=stats)
    assert [row.tolist() for row in rows] == expected
    assert stats.reasons == ["stop" if stop in row else "length" for row in free]
    assert "stop" in stats.reasons


@pytest.mark.parametrize("name", FEW)
def test_a_stopped_row_keeps_what_it_had(model, prompts, name):
    """The cache of a row that ended early holds exactly what the row alone holds."""
    free = [row.tolist() for row in generate(model, prompts, args_of(name), max_new_tokens=25, sampling=GREEDY)]
    stop = [free[1][5]]
    cache = KVCache.build(model, args_of(name), len(prompts), 70)
    generate(model, prompts, cache, max_new_tokens=25, sampling=GREEDY, stop=[stop])
    for b, prompt in enumerate(prompts):
        alone = KVCache.build(model, args_of(name), 1, 70)
        generate(model, [prompt], alone, max_new_tokens=25, sampling=GREEDY, stop=[stop])
        assert cache.pos[b] == alone.pos[0]
        assert cache.tokens()["seen"][b] == alone.tokens()["seen"][0]
        for both, single in zip(cache.slots, alone.slots):
            assert torch.equal(both.pos[:, b], single.pos[:, 0])
            for of, statistic in both.statistics.items():
                assert torch.allclose(statistic[:, b], single.statistics[of][:, 0])


def test_statistics_count_prompt_and_new_tokens(model, prompts):
    read = {"dense": sum(LENGTHS), "sink": sum(LENGTHS), "h2o": sum(min(n, 12) for n in LENGTHS)}
    read["h2o"] += 36 - 12 - 9  # of the longest, what is left when the other rows have ended after nine steps
    for name, tokens in read.items():
        stats = Stats()
        generate(model, prompts, args_of(name), max_new_tokens=9, sampling=GREEDY, stats=stats)
        assert stats.new_tokens == 9 * len(prompts)
        assert stats.decode_tokens == 8 * len(prompts)
        assert stats.prompt_tokens == sum(LENGTHS)
        assert stats.prefill_tokens == tokens
        assert stats.prefill_seconds > 0
        assert stats.decode_seconds > 0
    stats = Stats()  # a prompt alone: all of it is prefill, however it is read
    generate(model, prompts[-1:], args_of("h2o"), max_new_tokens=9, sampling=GREEDY, stats=stats)
    assert stats.prefill_tokens == stats.prompt_tokens == LENGTHS[-1]


def test_prefill_and_decode_are_the_pieces_of_generate(model, prompts):
    prompt, kv = prompts[-1][:10], args_of("sink")
    (expected,) = generate(model, [prompt], kv, max_new_tokens=8, sampling=GREEDY)
    cache, out = KVCache.build(model, kv, 1, 40), []
    logits, read = prefill(model, [prompt], cache)
    assert (logits.shape, read) == ((1, 61), [10])
    for _ in range(8):
        out.append(logits.argmax(-1))
        logits = decode(model, out[-1], cache)
    assert torch.cat(out).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": [[]]}, "Prompt 0 must be a list of at least one token"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[1], [61]]}, "Prompt 1 has a token outside the vocabulary of 61"),
        ({"prompts": [[-1]]}, "outside the vocabulary"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 96}, "96"),
        ({"stop": [[]]}, "stop sequence"),
        ({"prefill": "left"}, "prefill must be one of min-length, full, got 'left'"),
    ],
)
def test_what_is_refused(model, settings, message):
    given = {"prompts": [[1, 2]], "max_new_tokens": 3, **settings}
    with pytest.raises(ValueError, match=message):
        generate(model, given.pop("prompts"), sampling=GREEDY, **given)


def test_a_sampled_row_does_not_depend_on_its_partners(model, prompts):
    sampling = {"temperature": [0.5, 1.0, 1.5, 0.0, 1.0, 2.0], "top_k": [None, 5, None, 3, 7, None]}
    sampling |= {"top_p": [1.0, 0.9, 0.8, 1.0, 0.0, 0.95], "seed": [1, 2, 3, 4, 5, 1]}
    together = generate(model, prompts, args_of("h2o"), max_new_tokens=20, sampling=SamplingArgs(**sampling))
    for b, (row, prompt) in enumerate(zip(together, prompts)):
        own = SamplingArgs(**{name: values[b] for name, values in sampling.items()})
        (alone,) = generate(model, [prompt], args_of("h2o"), max_new_tokens=20, sampling=own)
        assert torch.equal(row, alone), b


def test_sampling_values_one_a_row_must_fit_the_batch(model, prompts):
    with pytest.raises(ValueError, match="top_k has 2 values for 6 rows"):
        generate(model, prompts, max_new_tokens=2, sampling=SamplingArgs(top_k=[1, 2]))
    with pytest.raises(ValueError, match="max_new_tokens has 2 values for 6 rows"):
        generate(model, prompts, max_new_tokens=[2, 3])


def test_arguments_are_checked_before_the_first_step(model):
    with pytest.raises(ValueError, match="max_new_tokens"):
        stream(model, [[1]], None, max_new_tokens=0)
    for given, message in (("h2o", "needs a KVCache"), (KVCacheArgs(), "needs a KVCache")):
        with pytest.raises(ValueError, match=message):
            stream(model, [[1]], given, max_new_tokens=2)
    with pytest.raises(ValueError, match="integer token ids"):
        generate(model, [[1.5]], max_new_tokens=2)
    with pytest.raises(ValueError, match="stop sequences"):
        generate(model, [[1]], max_new_tokens=2, stop=[2])


@pytest.mark.parametrize("name", ["dense", "window", "sink"])
@pytest.mark.parametrize("positions", ["absolute", "cache"])
def test_blocks_change_nothing_where_what_is_kept_does_not_hang_on_attention(model, prompts, name, positions):
    batch = [prompts[-1], prompts[-1].flip(0), torch.cat((prompts[-1], prompts[2]))]
    calls = []

    def counting(*args):
        calls.append(args[0].size(1))
        return model(*args)

    counting.lm_head = model.lm_head
    runs = []
    for chunk in (1, 3, None):
        calls.clear()
        cache = KVCache.build(model, args_of(name, positions=positions), 3, 80)
        steps = stream(counting, batch, cache, max_new_tokens=12, sampling=GREEDY, prefill_chunk=chunk)
        rows = [[], [], []]
        for step in steps:
            for row, tokens in zip(rows, step):
                row += tokens
        runs.append(rows)
        if name != "dense":
            assert calls[1] == {1: 1, 3: 3, None: 12 if name == "window" else 8}[chunk]
    assert runs[0] == runs[1] == runs[2]


def test_h2o_reads_one_token_at_a_time_unless_told(model, prompts):
    by_default, singly, in_blocks = (
        generate(model, prompts[-1:], args_of("h2o"), max_new_tokens=20, sampling=GREEDY, prefill_chunk=chunk)[0]
        for chunk in (None, 1, 6)
    )
    assert torch.equal(by_default, singly)
    assert not torch.equal(by_default, in_blocks)
    with pytest.raises(ValueError, match="prefill_chunk must be 1 to 12"):
        generate(model, prompts[-1:], args_of("h2o"), max_new_tokens=2, prefill_chunk=13)

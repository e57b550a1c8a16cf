"""Every strategy with every storage, on heads of their own keys and on latents: as with naively quantised tokens."""

from __future__ import annotations

import pytest
import torch

from litgpt_kv import GPT, KVCache, KVCacheArgs, registry
from tests.oracle.quantise import naive
from tests.oracle.reference import kept_of, logits_of, tiny, tokens_of
from tests.oracle.strategies import NAMES, options_of, plain
from tests.oracle.walks import storages_for

STORAGES = [name for name in storages_for("h2o") if name != "plain"]  # those that take every strategy
LATENT = dict(
    n_query_groups=4,
    latent_attention=dict(q_lora_rank=8, kv_lora_rank=9, qk_rope_head_dim=6, qk_nope_head_dim=5, v_head_dim=7),
)
ROWS, PROMPTS, BUDGET = [tokens_of(1, 14), tokens_of(2, 8)], [11, 5], 8
PAIRS = [(n, kind) for n in NAMES for kind in ("gqa", "latent") if kind == "gqa" or plain(n).latent]


@pytest.fixture(scope="module")
def models() -> dict[str, GPT]:
    """A layer for each storage."""
    return {kind: tiny(seed=4, n_layer=len(STORAGES), **more) for kind, more in (("gqa", {}), ("latent", LATENT))}


def args_of(name: str, model: GPT, storage: list[str] | str, options: dict) -> KVCacheArgs:
    budget = BUDGET if plain(name).evicts else None
    own = options_of(name, model.config)
    return KVCacheArgs(
        name, budget, storage=storage, storage_options=options, options=own, recent=2 if budget else None
    )


@pytest.mark.parametrize(("name", "kind"), PAIRS, ids=map("-".join, PAIRS))
def test_each_layer_has_another_storage(
    name: str, kind: str, models: dict[str, GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = models[kind], []
    for storage in STORAGES:
        monkeypatch.setitem(registry._KINDS["storage"], f"naive-{storage}", naive(storage))
    for storages in (STORAGES, [f"naive-{storage}" for storage in STORAGES]):
        cache = KVCache.build(model, args_of(name, model, storages, {"group": 4}), 2, 20)
        before = cache.allocated()
        found.append((logits_of(model, cache, ROWS, PROMPTS, "full"), [kept_of(cache, b) for b in range(2)]))
        assert cache.allocated() == before == KVCache.nbytes(model.config, cache.args, 2, 20, torch.float64)
    (ours, kept), (theirs, expected) = found
    assert kept == expected
    for b in range(2):
        assert ours[b].keys() == theirs[b].keys() and max(ours[b]) == len(ROWS[b]) - 1
        for i, logits in theirs[b].items():
            torch.testing.assert_close(ours[b][i], logits, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in NAMES if not plain(name).recency])
def test_kivi_names_the_strategy_that_it_does_not_take(name: str, models: dict[str, GPT]) -> None:
    model = models["gqa"]
    with pytest.raises(
        ValueError, match=f"'kivi' quantises neighbouring .* which those of '{name}' do not. Strategies"
    ):
        KVCache.build(model, args_of(name, model, "kivi", {}), 1, 20)

"""What a record says of caches: equal to `KVCache.inspect`, and to what two caches read by hand give, at every step."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from litgpt_kv import GPT, LLM, KVCache, KVCacheArgs
from litgpt_kv.cache.inspection import LayerContents
from litgpt_kv.evaluate.shadow import REFERENCE, lost_by_layer
from litgpt_kv.generate import prefill
from litgpt_kv.inspect import Record, answer_of, page, record, write_page
from litgpt_kv.inspect.pages import MARK, page_data
from litgpt_kv.inspect.records import BEST, NEVER, token_texts
from tests.inspect.conftest import CACHES, START, TEXT, TOTAL


def held(cache: KVCache, tokens: int) -> np.ndarray:
    """What `inspect` says of one row: (L, G, N) bool."""
    layers = cache.inspect(0)
    out = np.zeros((len(layers), len(layers[0].heads), tokens), dtype=bool)
    for layer, contents in enumerate(layers):
        for head, kept in enumerate(contents.heads):
            out[layer, head, kept.positions] = True
    return out


Walk = Iterator[tuple[Tensor, list[LayerContents], np.ndarray]]


def walk(llm: LLM, text: Tensor, args: KVCacheArgs) -> Walk:
    """Of every state the log-probabilities (V,) of the next token, what `inspect` says, and what is held."""
    cache = KVCache.build(llm.model, args, 1, TOTAL)
    logits = prefill(llm.model, [text[:START]], cache, "full")[0]
    for state in range(TOTAL - START + 1):
        yield logits[0].detach().log_softmax(-1), cache.inspect(0), held(cache, TOTAL)
        if state < TOTAL - START:
            logits = llm.model(text[START + state].view(1, 1), cache)[:, 0]


@pytest.fixture(scope="session")
def whole(llm: LLM, text: Tensor) -> list:
    return list(walk(llm, text, KVCacheArgs(REFERENCE)))


@pytest.mark.parametrize("name", CACHES)
def test_a_record_equals_a_walk_by_hand(name: str, llm: LLM, text: Tensor, found: Record, whole: list) -> None:
    one, states = found.cache(name), TOTAL - START + 1
    assert found.states == states and one.left.shape == (6, 3, TOTAL) and one.lost.shape == (states, 6)
    for state, ((p, full, _), (q, contents, kept)) in enumerate(zip(whole, walk(llm, text, CACHES[name]))):
        assert np.array_equal(found.kept(name, state), kept), state
        assert one.kl[state] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-6, abs=1e-12)
        assert one.best[state].tolist() == q.topk(BEST).indices.tolist()
        assert found.odds[state] == pytest.approx(p.exp().topk(BEST).values.numpy(), rel=1e-6)
        for layer, (all_tokens, kept) in enumerate(zip(full, contents)):
            shares = [
                float(a.statistics["last"][~torch.isin(a.positions, k.positions)].sum() / a.statistics["last"].sum())
                for a, k in zip(all_tokens.heads, kept.heads)
            ]
            assert one.lost[state, layer] == pytest.approx(sum(shares) / 3, rel=1e-6, abs=1e-12)
    assert one.kl.max() > 1e-3 and one.lost.max() > 0.05
    nbytes = [KVCache.nbytes(llm.config, args, 1, TOTAL, torch.float64)["total"] for args in (CACHES[name], "dense")]
    assert [one.allocated, found.allocated] == nbytes


def test_attention_by_token_is_that_of_inspect_for_every_row(gqa: GPT) -> None:
    cache = KVCache.build(gqa, KVCacheArgs("h2o", budget=6, select="pool", pools=1), 2, 20)
    prefill(gqa, [torch.arange(9), torch.arange(4)], cache, "full")
    for row, seen in enumerate((9, 4)):
        mass, kept = cache.by_token(row, 12, "mass"), cache.by_token(row, 12)
        for layer, contents in enumerate(cache.inspect(row)):
            for head, one in enumerate(contents.heads):
                assert kept[layer, head].nonzero().flatten().tolist() == one.positions.tolist()
                assert torch.equal(mass[layer, head][one.positions], one.statistics["mass"])
        assert kept[..., :seen].sum() == mass.count_nonzero() > 0 and not kept[..., seen:].any()
    with pytest.raises(ValueError, match="tokens must be at least 9, what the row has seen, got 8"):
        cache.by_token(0, 8)
    with pytest.raises(ValueError, match="h2o keeps no statistic 'last'; it keeps mass"):
        cache.by_token(0, 9, "last")


def test_a_full_cache_loses_nothing(llm: LLM, text: Tensor) -> None:
    one = record(llm, text[:12], 4, {"dense": KVCacheArgs()}).cache("dense")
    assert (one.left == NEVER).all() and one.lost.max() < 1e-12 and one.kl.max() < 1e-12
    full = KVCache.build(llm.model, REFERENCE, 1, 12)
    prefill(llm.model, [text[:12]], full, "full")
    assert lost_by_layer(full, full).tolist() == [0] * 6


def test_the_answer_is_the_full_caches(llm: LLM) -> None:
    ids, start = answer_of(llm, "def fib(n):", 8)
    assert llm.decode(ids[start:]) == llm.generate("def fib(n):", max_new_tokens=8, temperature=0.0)
    assert ids[:start].tolist() == llm.encode("def fib(n):").tolist() and len(ids) == start + 8


def test_texts_of_tokens_are_the_text_and_special_tokens_have_names(llm: LLM, text: Tensor) -> None:
    texts = token_texts(llm, llm.encode_text(TEXT))
    assert texts[0] == "<|endoftext|>" and "".join(texts[1:]) == TEXT
    half = llm.encode_text("😀")[:-1]  # a character that is not complete
    assert "".join(token_texts(llm, half)).startswith("<|endoftext|>")


# -- the page ----------------------------------------------------------------------------------------------------------


def data_of(html: str) -> dict:
    return json.loads(re.search(r"^const DATA = (.*);$", html, flags=re.M)[1])


def unpacked(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), kind)


def test_the_page_holds_the_record(found: Record, tmp_path: Path) -> None:
    size = write_page(found, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = data_of(html)
    assert size == len(html.encode()) and MARK not in html
    assert data == json.loads(json.dumps(page_data(found)))
    assert (data["start"], data["states"], data["layers"], data["heads"]) == (START, TOTAL - START + 1, 6, 3)
    assert data["tokens"] == found.texts and [one["name"] for one in data["caches"]] == [*CACHES]
    for one, cache in zip(found.caches, data["caches"]):
        assert np.array_equal(unpacked(cache["left"], "<u2").reshape(one.left.shape), one.left)
        assert np.array_equal(unpacked(cache["kl"], "<f4"), one.kl)
        assert np.abs(unpacked(cache["lost"], "<u2") / 65535 - one.lost.ravel()).max() <= 0.5 / 65535 + 1e-7
        assert [data["words"][i] for i in unpacked(cache["best"], "<u4")] == [found.words[i] for i in one.best.ravel()]
        assert np.abs(unpacked(cache["odds"], "u1") / 255 - one.odds.ravel()).max() <= 0.5 / 255 + 1e-7


def test_the_page_loads_nothing_and_no_text_ends_its_script(found: Record) -> None:
    nasty = ["</script><script>alert(1)</script>", "<!--", "\u2028&", "\\", '"', *found.texts[5:]]
    html = page(replace(found, texts=nasty))
    assert data_of(html)["tokens"] == nasty
    assert html.count("</script>") == 1 and "<!--" not in html and "\u2028" not in html
    assert "default-src 'none'" in html and not re.search(r"https?://|\bsrc=|@import|url\(", html)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (dict(ids=torch.arange(1100)), "The text has 1,100 tokens: a full cache to compare with holds at most"),
        (dict(start=0), "start must be at least 1, got 0"),
        (dict(start=TOTAL + 1), f"start must be at most {TOTAL}"),
        (dict(candidates={}), "There is no cache to look at"),
        (dict(candidates={"h2o": KVCacheArgs("h2o", budget=16, keep_prompt=True)}), "keep_prompt needs a budget of"),
    ],
)
def test_what_a_record_refuses(what: dict, message: str, llm: LLM, text: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        record(**{"llm": llm, "ids": text, "start": START, "candidates": CACHES, **what})


def test_what_is_asked_of_a_record(found: Record, llm: LLM, monkeypatch: pytest.MonkeyPatch, text: Tensor) -> None:
    with pytest.raises(ValueError, match=r"There is no cache 'h3o'; there are 'h2o', 'pool'"):
        found.cache("h3o")
    with pytest.raises(ValueError, match="state must be at most 12, got 13"):
        found.kept("h2o", 13)
    with pytest.raises(ValueError, match="The prompt has 7 tokens; with 1,020 new ones it is over the model's context"):
        answer_of(llm, "def fib(n):", 1020)
    monkeypatch.setattr("litgpt_kv.inspect.records.MOST_ENTRIES", 400)
    with pytest.raises(ValueError, match=r"A page with 612 entries .* 400 are allowed, 22 tokens of this model"):
        record(llm, text, START, CACHES)

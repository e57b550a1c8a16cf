"""Query centres against their definition, from a model to a cache that uses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from litgpt_kv import GPT, KVCache, KVCacheArgs
from litgpt_kv.__main__ import main
from litgpt_kv.cache.calibration import FORMAT
from litgpt_kv.cache.plan import spread_budget
from litgpt_kv.calibrate import (
    deserved_budgets,
    passkey_text,
    query_centres,
    retrieval_gates,
    write_calibration,
)
from tests.oracle.reference import Oracle, Policy, compare, tiny, tokens_of

DEVICE = ["--accelerator", "cpu", "--threads", "1"]
ROWS = [tokens_of(1, 9), tokens_of(2, 30)]


def test_centres_are_means_over_all_texts(gqa: GPT) -> None:
    queries: list[list[torch.Tensor]] = [[], []]
    for row in ROWS:
        oracle = Oracle(gqa, Policy())
        oracle.feed(row)
        for layer in range(2):
            queries[layer] += list(oracle.queries[layer][4:])
    found = query_centres(gqa, ROWS)
    assert sorted(found) == [f"layers.{i}.{name}" for i in (0, 1) for name in ("length", "mean")]
    for layer, every in enumerate(queries):
        assert len(every) == 5 + 26
        mean = sum(every) / len(every)
        length = sum(torch.complex(q[:, :3], q[:, 3:]).abs() for q in every) / len(every)
        for name, expected in (("mean", mean), ("length", length)):
            torch.testing.assert_close(found[f"layers.{layer}.{name}"], expected.float(), rtol=0, atol=1e-6)
    assert not any(block.attn._forward_pre_hooks for block in gqa.transformer.h)


def test_a_cache_uses_what_was_written(gqa: GPT, tmp_path: Path) -> None:
    write_calibration(tmp_path / "a.safetensors", "triattention", query_centres(gqa, ROWS), "tiny")
    options = dict(calibration=str(tmp_path / "a.safetensors"))
    rows = [torch.randperm(61, generator=torch.Generator().manual_seed(1)).tolist()[:30]]
    compare(gqa, Policy("triattention", 9, 1, 2, options=options, interval=3), rows, [20], "full")


def contributions(oracle: Oracle, layer: int, h: int, query: int, sees: list[int]) -> torch.Tensor:
    """What head h adds to a layer's output when the query at a position sees these tokens."""
    attn, D, groups = oracle.model.transformer.h[layer].attn, 6, len(oracle.kept[layer])
    g = h * groups // oracle.config.n_head
    q = oracle.rotate(oracle.queries[layer][query, h], query, layer)
    keys = torch.stack([oracle.rotate(oracle.keys[layer][p, g], p, layer) for p in sees])
    probs = (keys @ q / D**0.5).softmax(0)
    return attn.proj.weight[:, h * D : (h + 1) * D] @ (probs @ oracle.values[layer][sees, g])


def test_gates_rank_heads_by_what_they_lose(gqa: GPT) -> None:
    texts, lost = [(ROWS[1], 4), (tokens_of(3, 20), 3)], torch.zeros(2, 2, dtype=torch.float64)
    for row, n in texts:
        oracle = Oracle(gqa, Policy())
        oracle.feed(row)
        for layer in range(2):
            for query in range(len(row) - n, len(row)):
                every = list(range(query + 1))
                near = [p for p in every if p < 2 or p > query - 3]
                whole = [contributions(oracle, layer, h, query, every) for h in range(4)]
                for h in range(4):
                    change = contributions(oracle, layer, h, query, near) - whole[h]
                    lost[layer, h // 2] += change.norm() / sum(whole).norm()
    found = retrieval_gates(gqa, texts, sinks=2, recent=3)
    order = sorted((float(lost[layer, g]), layer, g) for layer in range(2) for g in range(2))
    for rank, (_, layer, g) in enumerate(order):
        assert found[f"layers.{layer}.gate"][2 * g : 2 * g + 2].tolist() == [rank / 4] * 2
    for wrong, message in (([], "at least one text"), ([(ROWS[1], 0)], "got 30 tokens that recall in the last 0")):
        with pytest.raises(ValueError, match=message):
            retrieval_gates(gqa, wrong, sinks=2, recent=3)


def test_budgets_are_shares_of_what_later_tokens_attend_to(gqa: GPT) -> None:
    shares = torch.zeros(2, 2)
    for row in ROWS:
        oracle, half, mass = Oracle(gqa, Policy()), len(row) // 2, {}
        oracle.feed(row[:half])
        for token in row[half:]:
            before = [[dict(m) for m in layer] for layer in oracle.mass]
            oracle.feed([token])
            for layer in range(2):
                for g in range(2):
                    for p in range(half):
                        gain = oracle.mass[layer][g][p] - before[layer][g].get(p, 0.0)
                        mass[layer, g, p] = mass.get((layer, g, p), 0.0) + gain
        best = sorted(mass, key=lambda key: -mass[key])[: round(0.3 * len(mass))]
        for layer, g, _ in best:
            shares[layer, g] += 4 / len(best) / len(ROWS)
    found = deserved_budgets(gqa, ROWS, keep=0.3)
    for layer in range(2):
        expected = shares[layer].repeat_interleave(2)
        torch.testing.assert_close(found[f"layers.{layer}.share"], expected, rtol=0, atol=1e-6)
    assert sum(float(x.mean()) for x in found.values()) == pytest.approx(2)
    with pytest.raises(ValueError, match="at least 8 tokens, got 3"):
        deserved_budgets(gqa, [[1, 2, 3]])


def test_a_file_of_budgets_is_a_pattern(gqa: GPT, tmp_path: Path) -> None:
    path = str(tmp_path / "b.safetensors")
    args = KVCacheArgs("h2o", 10, budget_pattern=path)
    with pytest.raises(ValueError, match=r"no budgets for 2 layers: .* --for budgets --out FILE.safetensors. makes"):
        KVCache.build(gqa, args)
    write_calibration(path, "budgets", {f"layers.{i}.share": torch.full((4,), 0.5 + i) for i in range(2)})
    assert [plan.slots for plan in KVCache.build(gqa, args).plans] == [5, 15]
    assert [plan.slots for plan in KVCache.build(gqa, args, max_tokens=12).plans] == [8, 12]
    assert spread_budget([0.0, 1.0, 2.0], 40, 100) == [2, 39, 79]
    assert spread_budget([1.0, 1.0, 1.0], 7, 100) == [7, 7, 7]
    for shares, message in ((torch.zeros(4), "all 0"), (torch.tensor([-1.0]), "numbers of 0 or more")):
        write_calibration(path, "budgets", {f"layers.{i}.share": shares.clone() for i in range(2)})
        with pytest.raises(ValueError, match=message):
            KVCache.build(gqa, args)


def test_passkeys_are_told_and_recalled() -> None:
    def encode(sentence: str) -> list[int]:
        return [ord(c) for c in sentence]

    ids, n = passkey_text([0] * 500, 1000, encode, seed=1, keys=3)
    text, recalled = "".join(map(chr, ids)), "".join(map(chr, ids[-n:]))
    assert len(ids) <= 1000 and recalled.count("passkey is") == 3
    for sentence in recalled.strip().split(". "):
        assert text.count(sentence.rstrip(".")) == 2
    with pytest.raises(ValueError, match=r"length must be at least .* for 8 passkeys, got 100"):
        passkey_text([0] * 500, 100, encode, seed=1)


def test_what_is_refused(gqa: GPT, tmp_path: Path) -> None:
    latent = dict(q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5)
    for model, rows, message in (
        (gqa, [], "at least one text"),
        (gqa, [[1, 2, 3, 4]], "5 to 96 tokens .the model's context., got 4"),
        (gqa, [[1] * 97], "got 97"),
        (tiny(n_query_groups=4, latent_attention=latent), ROWS, "not latent"),
    ):
        with pytest.raises(ValueError, match=message):
            query_centres(model, rows)
    file = tmp_path / "a.safetensors"
    good = query_centres(gqa, ROWS)
    build = lambda: KVCache.build(gqa, KVCacheArgs("triattention", 9, options=dict(calibration=str(file))))  # noqa: E731
    two = tiny(n_head=2, n_query_groups=2)
    nan = good | {"layers.1.mean": torch.full((4, 6), float("nan"))}
    for tensors, metadata, message in (
        (good, {"format": "x"}, "not written by this version"),
        ({"layers.0.mean": good["layers.0.mean"]}, {"format": FORMAT, "for": "y"}, "no layers.0.length: .* for 'y'"),
        (
            query_centres(two, ROWS),
            {"format": FORMAT},
            r"must be \[4, 6\] numbers, got \[2, 6\]",
        ),
        (nan, {"format": FORMAT}, "not finite"),
    ):
        save_file(tensors, file, metadata)
        with pytest.raises(ValueError, match=f"is no calibration for this model: .*{message}"):
            build()
    file.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="is no calibration for this model"):
        build()
    file.unlink()
    with pytest.raises(ValueError, match="is no calibration for this model"):
        build()


@pytest.mark.parametrize("name", ["triattention", "duo", "budgets"])
def test_the_command_makes_what_a_cache_takes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, out = tmp_path / "a.txt", tmp_path / "c.safetensors"
    text.write_text("def f(x):\n    return x\n" * 30)
    length = "50" if name != "duo" else "500"
    given = ["calibrate", "demo", "--text", str(text), "--for", name, "--out", str(out), "--length", length]
    main([*given, *DEVICE])
    printed = capsys.readouterr()
    assert "tokens; wrote" in printed.err
    command = printed.out.split()
    assert command[:3] == ["litgpt_kv", "generate", "demo"]
    main([*command[1:], "--prompt", "import os\n" * 9, "--max-new-tokens", "9", *DEVICE])
    assert f"Cache {'keydiff' if name == 'budgets' else name}" in capsys.readouterr().err


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, out = tmp_path / "a.txt", tmp_path / "c.safetensors"
    text.write_text("def f(x):\n    return x\n" * 30)
    for wrong, says in (
        (["--for", "h2o"], "--for must be one of triattention, duo, budgets, got 'h2o'"),
        (["--text", str(tmp_path / "no.txt")], "no.txt' cannot be read"),
        (["--length", "4"], "length must be at least 5, got 4"),
        (["--for", "budgets", "--out", "x.yaml"], "name that ends with .safetensors, got 'x.yaml'"),
    ):
        given = ["calibrate", "demo", "--text", str(text), "--for", "triattention", "--out", str(out), *DEVICE]
        with pytest.raises(SystemExit) as end:
            main([*given, *wrong])
        assert end.value.code == 2 and says in capsys.readouterr().err

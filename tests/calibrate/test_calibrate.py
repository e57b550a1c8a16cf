"""Query centres against their definition, from a model to a cache that uses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from litgpt_kv import GPT, KVCache, KVCacheArgs
from litgpt_kv.__main__ import main
from litgpt_kv.cache.constants import FORMAT
from litgpt_kv.calibrate import query_centres, write_calibration
from tests.oracle.reference import Oracle, Policy, compare, tiny, tokens_of

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


def test_the_command_makes_what_the_strategy_takes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, out = tmp_path / "a.txt", tmp_path / "c.safetensors"
    text.write_text("def f(x):\n    return x\n" * 30)
    options = ["--accelerator", "cpu", "--threads", "1"]
    main(
        [
            "calibrate",
            "demo",
            "--text",
            str(text),
            "--for",
            "triattention",
            "--out",
            str(out),
            "--length",
            "50",
            *options,
        ]
    )
    printed = capsys.readouterr()
    assert "tokens; wrote" in printed.err
    command = printed.out.split()
    assert command[:3] == ["litgpt_kv", "generate", "demo"]
    main([*command[1:], "--prompt", "import os\n" * 9, "--max-new-tokens", "9", *options])
    assert "Cache triattention" in capsys.readouterr().err
    for wrong, says in (
        (["--for", "h2o"], "--for must be one of triattention, got 'h2o'"),
        (["--text", str(tmp_path / "no.txt")], "no.txt' cannot be read"),
        (["--length", "4"], "length must be at least 5, got 4"),
    ):
        given = ["calibrate", "demo", "--text", str(text), "--for", "triattention", "--out", str(out), *options]
        with pytest.raises(SystemExit) as end:
            main([*given, *wrong])
        assert end.value.code == 2 and says in capsys.readouterr().err

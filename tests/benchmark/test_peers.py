"""Other libraries in the benchmark: the same weights, tokens and results; rows of those that cannot run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from litgpt_kv import registry
from litgpt_kv.__main__ import main
from litgpt_kv.benchmark.peers import gguf_writer, llama
from litgpt_kv.benchmark.peers.base import Job, Peer, Unable, Variant, float_state
from litgpt_kv.benchmark.peers.litgpt_cache import Litgpt
from litgpt_kv.benchmark.peers.openvino_model import PlainLlama
from litgpt_kv.benchmark.peers.ours import Ours
from litgpt_kv.benchmark.peers.picture import draw_costs
from litgpt_kv.benchmark.peers.report import Settings
from litgpt_kv.benchmark.peers.run import Measured, collect, measure, row_lengths
from litgpt_kv.convert.gguf_file import GGUFFile
from litgpt_kv.convert.weights import plan_weights, read_weight
from litgpt_kv.model.quantized import to_int8
from tests import speed_goals
from tests.oracle.reference import lift, theta, tiny

SMALL = ["--accelerator", "cpu", "--shape.n_layer", "1", "--shape.n_embd", "96", "--steps", "2", "--repeats", "2"]
LENGTHS = {"same": (9, 9), "ragged": (3, 17)}
STEPS = 4


def run(variant: Variant, prompts: list[Tensor], later: Tensor) -> list[Tensor]:
    """The logits (B, V) after the prompts and after each of the tokens (steps, B)."""
    with torch.inference_mode():
        if variant.twin is None:
            found = [variant.prefill(prompts)]
        else:
            found = [variant.twin.prefill(prompts)]
            variant.follow()
        return found + [variant.step(tokens) for tokens in later]


def expected(job: Job, prompts: list[Tensor], later: Tensor) -> list[Tensor]:
    """What the model gives for each whole text, without a cache."""
    rows = [job.model(torch.cat((p, later[:, b])).unsqueeze(0))[0, len(p) - 1 :] for b, p in enumerate(prompts)]
    return list(torch.stack(rows, dim=1))


def texts(job: Job) -> tuple[list[Tensor], Tensor]:
    vocabulary = job.config.vocab_size
    return [torch.randint(vocabulary, (n,)) for n in job.lengths], torch.randint(vocabulary, (STEPS, job.rows))


def same(variant: Variant, job: Job) -> None:
    """Twice, since prompts are read again and again."""
    for _ in range(2):
        prompts, later = texts(job)
        for own, wanted in zip(run(variant, prompts, later), expected(job, prompts, later), strict=True):
            torch.testing.assert_close(own, wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_ours(lengths: tuple[int, ...]) -> None:
    job = Job(tiny(), lengths, STEPS)
    same(Ours(job, "dense", False, None), job)


def test_litgpt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # the step as it is before it is compiled
    job = Job(tiny(), LENGTHS["same"], STEPS, compiled=True)
    eager, compiled = Litgpt().variants(job)
    lift(eager.model)  # its norms are in float32 else
    same(eager, job)
    same(compiled, job)
    with pytest.raises(Unable, match="one length only"):
        next(Litgpt().variants(Job(tiny(), LENGTHS["ragged"], STEPS)))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_transformers(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", minversion="4.51.3")
    from litgpt_kv.benchmark.peers.transformers_caches import Transformers
    from tests.model.test_hf import exact

    job = Job(tiny(), lengths, STEPS, compiled=True)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    variants = list(Transformers().variants(job))
    assert [v.name for v in variants] == ["dynamic cache", "static cache", "static cache, compiled"]
    exact(variants[0].model, job.model)
    for variant in variants:
        same(variant, job)


def test_the_form_for_openvino() -> None:
    """The model that OpenVINO's converter gets, in PyTorch, with a row that is padded on the left."""
    model = tiny()
    plain = PlainLlama(model.config, float_state(model)).double()
    angle = theta(model)[0].flatten()[:3]
    torch.testing.assert_close(plain.frequencies, angle, rtol=1e-6, atol=0)
    plain.frequencies = angle  # in float64
    job = Job(model, (5, 8), 0)
    prompts, later = texts(job)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    tokens[0, 3:], tokens[1] = prompts
    mask = torch.ones(2, 8 + STEPS, dtype=torch.int64)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    empty = [torch.zeros(2, model.config.n_query_groups, 0, 6, dtype=torch.float64)] * 4
    with torch.inference_mode():
        logits, *past = plain(tokens, mask[:, :8], positions[:, :8], *empty)
        own = [logits[:, -1]]
        for step, row in enumerate(later):
            end = 9 + step
            logits, *past = plain(row.unsqueeze(1), mask[:, :end], positions[:, end - 1 : end], *past)
            own.append(logits[:, -1])
        for found, wanted in zip(own, expected(job, prompts, later), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_gguf_file_has_the_weights(kind: str, tmp_path: Path) -> None:
    """What is written is read by our own converter, which takes llama.cpp's order of rows apart again."""
    model = tiny(exact=False, n_embd=64, head_size=16, intermediate_size=32).float()
    file = tmp_path / "model.gguf"
    gguf_writer.write_gguf(model.config, float_state(model), kind, file)
    read = GGUFFile(file)
    plan = plan_weights(read, "llama", model.config)
    largest = 0.0
    for name, weight in float_state(model).items():
        found = read_weight(read, "llama", plan[name], torch.float32)
        largest = max(largest, float((found - weight).abs().max() / weight.abs().max()))
    blocks = 0.5 / 127 + 2**-11  # half a step, and a scale in float16
    assert largest == 0 if kind == "f32" else 0 < largest <= blocks, largest
    types, size = gguf_writer.types_of(file)
    matrices = sum(w.numel() for n, w in float_state(model).items() if w.dim() == 2 and "wte" not in n)
    vectors = 4 * sum(w.numel() for w in float_state(model).values() if w.dim() == 1)
    assert (types, size) == (kind.upper(), matrices * (4 if kind == "f32" else 34 / 32) + vectors)


def test_gguf_files_of_a_job(tmp_path: Path) -> None:
    given = tmp_path / "given.gguf"
    given.write_bytes(b"")
    model = tiny(exact=False).float()
    job = Job(model, (4,), 2, gguf=(str(given), "Q8_0", "f16", "nothing"), folder=tmp_path)
    first, blocks, halves, nothing = gguf_writer.gguf_files(job)
    assert first == given and halves == tmp_path / "f16.gguf" and halves.is_file()
    assert "Q8_0" in str(blocks) and isinstance(blocks, Unable)  # rows of 24 are no whole blocks
    assert "nothing" in str(nothing)
    with pytest.raises(Unable, match="cannot be read"):
        gguf_writer.types_of(given)
    (only,) = gguf_writer.gguf_files(Job(model, (4,), 2, folder=tmp_path))
    assert only.name == "f32.gguf"


@pytest.mark.parametrize("changes", [{"attn_bias": True}, {"rotary_percentage": 0.5}, {"norm_class_name": "LayerNorm"}])
def test_other_architectures_are_refused(changes: dict) -> None:
    with pytest.raises(Unable, match=f"here {next(iter(changes))} is not"):
        llama.settings(tiny(exact=False, **changes).config)


class Fake(Variant):
    """A library of the tests: it gives our own logits."""

    name, weights, weight_bytes, token_bytes = "cache", "float32", 1000, 10

    def __init__(self, job: Job, fails: bool = False) -> None:
        self.own, self.fails, self.closed = Ours(job, "dense", False, None), fails, False

    def prefill(self, prompts: list[Tensor]) -> Tensor:
        return self.own.prefill(prompts)

    def step(self, tokens: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("no steps\ntoday")
        return self.own.step(tokens)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that run, fail, are missing, and refuse."""
    monkeypatch.setattr(registry, "_KINDS", {kind: dict(table) for kind, table in registry._KINDS.items()})

    @registry.register("peer", "runs")
    class Runs(Peer):
        title: ClassVar[str] = "runs"
        packages: ClassVar[dict[str, str]] = {"torch": "torch"}

        def variants(self, job: Job) -> Iterator[Variant | Unable]:
            yield Fake(job)
            yield Unable("has no second way")
            yield Fake(job, fails=True)

    @registry.register("peer", "missing")
    class Missing(Runs):
        title: ClassVar[str] = "missing"
        packages: ClassVar[dict[str, str]] = {"no_such_module": "no-such-package"}

    @registry.register("peer", "breaks")
    class Breaks(Peer):
        title: ClassVar[str] = "breaks"

        def variants(self, job: Job) -> Iterator[Variant | Unable]:
            raise KeyError("its own error")


@pytest.mark.usefixtures("fakes")
def test_the_command(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "out.json", tmp_path / "plot.svg"
    flags = ["--contexts", "[24, 12]", "--peers", "runs, missing,breaks,litgpt", "--strategies", "[dense, h2o]"]
    main(["benchmark", *SMALL, *flags, "--budget", "8", "--out", str(out), "--plot", str(plot)])
    table = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert f"torch {torch.__version__}" in report["machine"] and f"torch {torch.__version__}" in report["versions"]
    for text in (
        "missing +not installed: pip install no-such-package",
        "breaks +'its own error'",
        "runs +has no second way",
        "runs +cache: no steps today",
        r"runs cache +float32 .* 100%",
        r"litgpt_kv h2o +float32",
        r"litgpt own cache +float32 .* 100%",
    ):
        assert len(re.findall(f"^{text}$" if text[-1].isalpha() else f"^{text}", table, re.MULTILINE)) == 2, text
    rows = [row for row in report["rows"] if "problem" not in row]
    assert {(row["library"], row["context"]) for row in rows} == {
        (library, context) for library in ("litgpt_kv", "runs", "litgpt") for context in (12, 24)
    }
    for row in rows:
        assert 0 < row["decode_ms"][0] <= row["decode_ms"][1]
        assert row["decode_tokens_per_s"][0] == pytest.approx(1e3 / row["decode_ms"][0])
        first = next(r for r in rows if r["context"] == row["context"] and r.get("cache") == "dense")
        assert row["decode_ratio"][0] == pytest.approx(row["decode_ms"][0] / first["decode_ms"][0])
        assert row["prefill_ratio"][0] == pytest.approx(
            first["prefill_tokens_per_s"][0] / row["prefill_tokens_per_s"][0]
        )
    assert plot.read_text().startswith("<?xml")
    figure = draw_costs(report["rows"], tmp_path / "again.png")
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}
    assert set(drawn) == {"litgpt_kv dense", "litgpt_kv h2o", "runs cache", "litgpt own cache"}
    for name, (contexts, costs) in drawn.items():
        assert contexts == [12, 24]
        own = sorted((r["context"], r["decode_ms"][0]) for r in rows if f"{r['library']} {r['cache']}" == name)
        assert costs == [ms for _, ms in own]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peers", "litgtp"], "Unknown peer 'litgtp'. Available: litgpt, llama.cpp, openvino, transformers. Did you"),
        (["--ragged"], "a batch_size of 2 or more"),
        (["--prefills", "0"], "prefills must be at least 1"),
        (["--plot", "costs.txt"], "plot must be a file name that ends in .png"),
        (["--quantize", "bnb.nf4"], "benchmark measures quantize int8, got 'bnb.nf4'"),
        (["--peers", "litgpt", "--devices", "2"], "on one device"),
        (["--peers", "litgpt", "--checkpoint-dir", "demo", "--contexts", "[1020]"], "A context of 1020 and 6 steps"),
    ],
)
def test_what_is_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["benchmark", *SMALL, *flags])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_int8_weights(capsys: pytest.CaptureFixture) -> None:
    flags = [*SMALL, "--contexts", "[12]", "--quantize", "int8", "--strategies", "[dense]"]
    main(["benchmark", *flags])
    assert re.search(r"^litgpt .*\d", capsys.readouterr().out, re.MULTILINE)
    main(["benchmark", *flags, "--peers", "litgpt"])
    table = capsys.readouterr().out
    assert re.search(r"^litgpt_kv dense +int8 ", table, re.MULTILINE)
    assert re.search(r"^litgpt own cache +float32 ", table, re.MULTILINE)


def test_other_libraries_get_the_values_of_int8_weights() -> None:
    model = tiny(exact=False, n_embd=32, head_size=8, intermediate_size=32).float()
    names = set(float_state(model))
    to_int8(model)
    state = float_state(model)
    assert set(state) == names
    quantized = model.transformer.h[0].attn.proj
    wanted = quantized.weight.float() * quantized.scale.float().unsqueeze(1)
    torch.testing.assert_close(state["transformer.h.0.attn.proj.weight"], wanted, rtol=0, atol=0)
    assert Ours(Job(model, (4,), 2), "dense", False, None).weights == "int8"


def test_what_a_step_reads() -> None:
    job = Job(tiny(), (10, 30), 10, budget=8)
    config = job.config
    token = 2 * config.n_layer * config.n_query_groups * config.head_size * 8  # float64
    weights = sum(8 * w.numel() for name, w in job.state.items() if "wte" not in name)
    dense, h2o = (Ours(job, name, False, None) for name in ("dense", "h2o"))
    assert dense.read_bytes([10, 30]) == weights + 40 * token
    assert h2o.read_bytes([6, 30]) == weights + (6 + 8) * token
    assert (job.kept, Job(job.model, (30,), 10, budget="50%").kept) == (8, 20)


def test_lengths_of_rows() -> None:
    assert row_lengths(100, 1, False) == (100,)
    assert row_lengths(100, 3, False) == (100, 100, 100)
    assert row_lengths(100, 4, True) == (10, 40, 70, 100)


def test_prompts_in_blocks() -> None:
    """Strategies that evict read the rest of a prompt in blocks; dense keeps everything, so it has one pass."""
    job = Job(tiny(), (30,), STEPS, budget=12)
    prompts, later = texts(job)
    blocks, steps = Ours(job, "window", False, 5), Ours(job, "window", False, 1)
    for one, other in zip(run(blocks, prompts, later), run(steps, prompts, later), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
    same(Ours(job, "dense", False, 5), job)


def test_a_variant_that_fails_gives_up_its_memory() -> None:
    job = Job(tiny(), (5,), 6)
    fake = Fake(job, fails=True)
    entries = [Measured("litgpt_kv", Ours(job, "dense", False, None)), Measured("fake", fake)]
    measure(entries, [torch.randint(61, (11,))], job, steps=2, repeats=2, prefills=1)
    assert fake.closed and entries[1].variant is None and entries[1].problem == "cache: no steps today"
    assert len(entries[0].step_seconds) == 2 and len(entries[0].top) == 3
    with pytest.raises(RuntimeError, match="no steps"):  # errors of ours are not hidden
        measure([Measured("litgpt_kv", Fake(job, fails=True))], [torch.randint(61, (11,))], job, 2, 2, 1)


@pytest.mark.usefixtures("fakes")
def test_entries() -> None:
    entries = collect(Job(tiny(), (5,), 6), ["missing", "runs"], ["dense"], None)
    assert [entry.name for entry in entries] == ["litgpt_kv dense", "missing", "runs cache", "runs", "runs cache"]


def goal_row(library: str, cache: str, context: int, ms: float, **more: object) -> dict:
    return {"library": library, "cache": cache, "context": context, "decode_ms": [ms, ms], "of_limit": 0.8, **more}


def test_the_table_of_goals() -> None:
    sizes = speed_goals.SMALL
    at = sizes.contexts
    dense = [goal_row("litgpt_kv", "dense", context, 10.0) for context in at]
    dense += [goal_row("litgpt", "own cache", context, 20.0, prefill_ratio=[1.9, 1.9]) for context in at]
    dense += [
        goal_row("transformers", "dynamic cache", at[0], 15.0),
        goal_row("transformers", "static cache", at[0], 11.0),
    ]
    flat = [goal_row("litgpt_kv", "dense", sizes.flat[2], 20.0)]
    flat += [
        goal_row("litgpt_kv", name, context, ms)
        for name, ms in (("h2o", 10.0), ("sink", 11.0))
        for context in sizes.flat
    ]
    flat[-1]["decode_ms"] = [13.0, 13.0]  # sink at the longest context
    reports = {"dense": {"rows": dense}, "flat": {"rows": flat}}
    reports["int8"] = {"rows": [{"library": "llama.cpp", "problem": "not installed"}]}
    found = {goal.text: goal for goal in speed_goals.goals(reports, sizes)}
    held = {text: goal.held for text, goal in found.items()}
    assert [held[f"dense against litgpt at {context}"] for context in at] == [True, True, False]
    assert found[f"dense, against transformers' best at {at[0]}"].measured == pytest.approx(1.1)
    assert held[f"dense, against transformers' best at {at[0]}"] is False
    assert held[f"dense, compiled, against transformers' best at {at[0]}"] is None
    assert held[f"share of the read bandwidth, dense, at {at[0]}"] is True
    assert held[f"share of the read bandwidth, dense, compiled, at {at[0]}"] is None
    assert held[f"prefill of {at[1]} against litgpt"] is True
    flatness = {
        name: next(g for t, g in found.items() if t.startswith(f"{name} 32, how far")) for name in ("h2o", "sink")
    }
    assert flatness["h2o"].measured == 0 and flatness["h2o"].held
    assert flatness["sink"].measured == pytest.approx(1 / 12) and not flatness["sink"].held
    assert (
        held[f"h2o 32 against own dense at {sizes.flat[2]}"]
        and found["int8 weights, dense, against llama.cpp with any file"].why == "llama.cpp: not installed"
    )


def test_how_often_the_next_token_is_the_same() -> None:
    """Only what both know counts: a library may tell no more than its first tokens."""
    first = Measured("litgpt_kv", top={i: torch.tensor([1, 2]) for i in range(3)})
    told = {0: torch.tensor([1, 2]), 1: torch.tensor([1, 0])}
    assert Measured("other", top=told).agreement(first) == 0.75
    assert Measured("other", top={2: torch.tensor([0, 2])}).agreement(first) == 0.5
    assert Measured("other").agreement(first) is None


def test_how_often_prompts_are_read() -> None:
    assert [Settings().times_read(n) for n in (4096, 4097)] == [5, 1]
    assert [Settings(prefills=3).times_read(n) for n in (16, 65536)] == [3, 3]

"""Every registered storage: what is written into slots is read from them, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from litgpt_kv import registry

ALL = [n for n in registry.names("storage") if not registry.get("storage", n).needs_accelerator]
NAMES = [n for n in ALL if not registry.get("storage", n).in_order]  # these take any slot at any time
B, G, S, D = 3, 2, 6, 32
ERROR = {"plain": 0.0, "int8": 0.02, "int4": 0.3, "k8v4": 0.02, "int4-hadamard": 0.8}  # of values within about three
CPU = torch.device("cpu")


def make(name: str, dtype: torch.dtype = torch.float32, batch: int = B) -> torch.nn.Module:
    return registry.build("storage", name, "keys", (batch, G, S, D), dtype, CPU)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3).to(dtype)


def slots(P: int, T: int, seed: int = 0) -> Tensor:
    """(B, P, T) distinct slots in no order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(S, generator=generator)[:T] for _ in range(B * P)]).view(B, P, T)


def near(name: str, got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=ERROR.get(name, 0.3), rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_unused_slots_are_zero(name: str) -> None:
    store = make(name)
    assert torch.equal(store.read(S), torch.zeros(B, G, S, D))
    store.write(slots(1, 2), draw(B, G, 2, D))
    used = slots(1, 2)
    for b in range(B):
        for s in set(range(S)) - set(used[b, 0].tolist()):
            assert (store.read(S)[b, :, s] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("P", [1, G])
@pytest.mark.parametrize("T", [1, 3, S])
def test_what_is_written_is_read(name: str, P: int, T: int) -> None:
    store, slot, x = make(name), slots(P, T), draw(B, G, T, D)
    store.write(slot, x)
    got = store.read(S)
    for b in range(B):
        for g in range(G):
            for t in range(T):
                near(name, got[b, g, slot[b, g if P > 1 else 0, t]], x[b, g, t])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("P", [1, G])
def test_a_write_replaces_its_slots_and_leaves_the_others_as_they_are(name: str, P: int) -> None:
    store = make(name)
    store.write(slots(1, S), draw(B, G, S, D))
    before, slot, x = store.read(S).clone(), slots(P, 2, seed=5), draw(B, G, 2, D, seed=1)
    store.write(slot, x)
    after = store.read(S)
    written = torch.zeros(B, G, S, dtype=torch.bool).scatter_(2, slot.expand(B, G, 2), True)
    assert torch.equal(after[~written], before[~written])
    assert not torch.equal(after[written], before[written])
    near(name, after.gather(2, slot.expand(B, G, 2).unsqueeze(-1).expand(B, G, 2, D)), x)


@pytest.mark.parametrize("name", NAMES)
def test_reading_an_extent(name: str) -> None:
    store = make(name)
    store.write(slots(1, S), draw(B, G, S, D))
    for extent in (1, 4, S):
        assert torch.equal(store.read(extent), store.read(S)[:, :, :extent])


def test_plain_is_read_without_a_copy_and_exact() -> None:
    store = make("plain")
    x = draw(B, G, S, D)
    store.write(torch.arange(S).expand(B, 1, S), x)
    assert torch.equal(store.read(S), x)
    assert store.read(3).untyped_storage().data_ptr() == store.data.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [slice(None), [1], [0, 2], []])
def test_reset_empties_rows_and_only_those(name: str, rows: slice | list[int]) -> None:
    store, other = make(name), make(name)
    for each in (store, other):
        each.write(slots(1, S), draw(B, G, S, D))
    store.reset(rows if isinstance(rows, slice) else torch.tensor(rows, dtype=torch.int64))
    gone = set(range(B)[rows] if isinstance(rows, slice) else rows)
    for b in range(B):
        expected = torch.zeros(G, S, D) if b in gone else other.read(S)[b]
        assert torch.equal(store.read(S)[b], expected)
    store.write(slots(1, S), draw(B, G, S, D))  # and rows are as good as new
    assert torch.equal(store.read(S), other.read(S))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """Reads give the cache's dtype whatever is written: a bfloat16 cache of a float32 model rounds once."""
    store, x = make(name, dtype), draw(B, G, S, D)
    store.write(torch.arange(S).expand(B, 1, S), x)
    assert store.read(S).dtype == dtype
    if name == "plain":
        assert torch.equal(store.read(S), x.to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_buffers_are_sized_once_and_in_no_state_dict(name: str) -> None:
    store = make(name)
    assert dict(store.state_dict()) == {}
    assert list(store.parameters()) == []
    before = {k: (b.data_ptr(), b.shape) for k, b in store.named_buffers()}
    assert before
    store.write(slots(1, S), draw(B, G, S, D))
    store.read(S)
    store.reset(slice(None))
    assert {k: (b.data_ptr(), b.shape) for k, b in store.named_buffers()} == before


@pytest.mark.parametrize("name", NAMES)
def test_rows_come_first_in_every_buffer(name: str) -> None:
    """A view of one row is cut out of each buffer's first dimension."""
    assert all(b.size(0) == 5 for b in make(name, batch=5).buffers())


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    alone, together = make(name, batch=1), make(name)
    slot, x = slots(1, 4), draw(B, G, 4, D)
    together.write(slot, x)
    alone.write(slot[1:2], x[1:2])
    assert torch.equal(alone.read(S), together.read(S)[1:2])

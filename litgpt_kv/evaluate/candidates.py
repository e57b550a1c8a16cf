"""Names of caches to compare: `h2o`, `keydiff:pool`, `dense@int8`, `snapkv window=16`, with a budget."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import yaml

from litgpt_kv import registry
from litgpt_kv.cache.plan import ready_strategies
from litgpt_kv.config import KVCacheArgs, split_name

OWN = {
    "strategy",
    "budget",
    "storage",
    "select",
    "options",
    "storage_options",
}  # fields that a name has another way for
FORM = "NAME[:SELECT][@STORAGE] [OPTION=VALUE ...]"


@dataclass(frozen=True)
class Candidate:
    """A cache to compare.

    Attributes:
        spec: As the user wrote it.
        budget: Tokens or a share; None for strategies that keep everything.
        args: The arguments of the cache.
    """

    spec: str
    budget: int | str | None
    args: KVCacheArgs

    @property
    def name(self) -> str:
        return self.spec if self.budget is None else f"{self.spec} {self.budget}"


def candidates(specs: list[str] | None, budgets: list[int | str], base: KVCacheArgs) -> list[Candidate]:
    """Every cache to compare, each strategy that evicts with every budget.

    Args:
        specs: NAME[:SELECT][@STORAGE] [OPTION=VALUE ...], as in h2o, keydiff:pool, dense@int8, my_file.py:MyStrategy or
            "snapkv window=16"; options are the strategy's, the storage's, or fields of `KVCacheArgs`. None: every
            registered strategy that needs no file.
        budgets: Tokens, or shares of the longest row.
        base: All other arguments; of its options each cache takes those that its strategy and its storage have.

    Raises:
        ValueError: For an unknown name or a value out of range, or an option of `base` that no cache takes.
    """
    made = []
    taken: set[str] = set()
    for spec in dict.fromkeys(specs or ready_strategies()):
        args = _arguments(spec, base)
        taken |= {*args.options, *args.storage_options}
        if not registry.get("strategy", str(args.strategy)).evicts:
            made.append(Candidate(spec, None, args))
            continue
        pattern = _given(spec).get("budget_pattern", base.budget_pattern)
        for budget in dict.fromkeys(budgets):
            made.append(Candidate(spec, budget, replace(args, budget=budget, budget_pattern=pattern)))
    if lost := [name for name in (*base.options, *base.storage_options) if name not in taken]:
        raise ValueError(f"No cache that is compared has the option {lost[0]!r}.")
    return made


def _arguments(spec: str, base: KVCacheArgs) -> KVCacheArgs:
    """What a name comes to, without budgets."""
    given = _given(spec)
    name, select, storage = split_name(spec.split(maxsplit=1)[0] if spec.split() else "")
    storage = storage or str(base.storage)
    own, stored = registry.options("strategy", name), registry.options("storage", storage)
    plain = [field.name for field in fields(KVCacheArgs) if field.name not in OWN]
    if unknown := [key for key in given if key not in (*own, *stored, *plain)]:
        raise ValueError(f"{spec!r} has no option {unknown[0]!r}; it takes {', '.join((*own, *stored, *plain))}.")
    changes: dict[str, Any] = {key: given[key] for key in plain if key in given}
    return replace(
        base,
        **{**changes, "budget": None, "budget_pattern": None},
        strategy=name,
        select=select or base.select,
        storage=storage,
        options={key: value for key, value in {**base.options, **given}.items() if key in own},
        storage_options={key: value for key, value in {**base.storage_options, **given}.items() if key in stored},
    )


def _given(spec: str) -> dict[str, Any]:
    """The options in a name."""
    found = {}
    for word in spec.split()[1:]:
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise ValueError(f"Caches are named {FORM}, got {spec!r}.")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{word!r} in {spec!r} has no value that can be read.") from error
    return found

"""Names of caches to compare: `h2o`, `keydiff:pool`, `dense@int8`, with a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

from litgpt_kv import registry
from litgpt_kv.cache.plan import ready_strategies
from litgpt_kv.config import KVCacheArgs

SELECTS = (":head", ":layer", ":pool", ":model")


@dataclass(frozen=True)
class Candidate:
    """A cache to compare.

    Attributes:
        spec: As the user wrote it. budget: Tokens or a share; None for strategies that keep everything.
        args: What it comes to.
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
        specs: NAME[:SELECT][@STORAGE], as in h2o, keydiff:pool, dense@int8 or my_file.py:MyStrategy; None: every
            registered strategy that needs no file.
        budgets: Tokens, or shares of the longest row. base: All other arguments.

    Raises:
        ValueError: For an unknown name or a value out of range.
    """
    made = []
    for spec in dict.fromkeys(specs or ready_strategies()):
        name, _, storage = spec.partition("@")
        select = name.rpartition(":")[2] if name.endswith(SELECTS) else ""
        name = registry.import_named(name.removesuffix(f":{select}") if select else name)
        args = replace(base, strategy=name, budget=None, select=select or base.select, storage=storage or base.storage)
        args = replace(args, options={k: v for k, v in args.options.items() if k in registry.options("strategy", name)})
        if not registry.get("strategy", name).evicts:
            made.append(Candidate(spec, None, args))
            continue
        made += [Candidate(spec, budget, replace(args, budget=budget)) for budget in dict.fromkeys(budgets)]
    return made

"""What the user's arguments come to for each layer, settled and checked before anything is allocated. Floor 3."""

from __future__ import annotations

from dataclasses import dataclass, replace

from litgpt.config import Config
from litgpt_kv import registry
from litgpt_kv.cache.strategies.base import Strategy
from litgpt_kv.config import KVCacheArgs, LayerFacts, layer_facts, per_layer, percent


@dataclass(frozen=True)
class Plan:
    """One layer's choices, settled and checked."""

    facts: LayerFacts
    strategy: Strategy
    slots: int
    sinks: int
    recent: int
    storage: str
    positions: str
    window: int | None

    @property
    def raw(self) -> bool:
        """Whether keys are stored unrotated: their positions change with every eviction."""
        return self.positions == "cache" and not self.strategy.recency

    @property
    def endless(self) -> bool:
        """Whether positions may pass the model's context."""
        return self.positions == "cache" and self.strategy.evicts

    @property
    def shared(self) -> tuple:
        facts = replace(self.facts, index=0)
        return self.strategy, self.slots, self.sinks, self.recent, self.positions, self.window, facts


def settle(config: Config, args: KVCacheArgs, max_tokens: int, context: int) -> list[Plan]:
    """One plan a layer.

    Args:
        config: Of the model. args: What the user asked for.
        max_tokens: How many tokens a row may see. context: Positions in the model's rope tables.

    Raises:
        ValueError: If the arguments contradict each other; the message has the value and the limit.
    """
    n = config.n_layer
    values = [per_layer(name, getattr(args, name), n) for name in ("strategy", "budget", "sinks", "recent", "storage")]
    fields = {name: registry.options("strategy", name) for name in dict.fromkeys(values[0])}
    if unknown := [k for k in args.options if not any(k in own for own in fields.values())]:
        registry.build("strategy", values[0][0], **{unknown[0]: None})  # says what there is
    plans = []
    for i, (name, budget, sinks, recent, kind) in enumerate(zip(*values)):
        facts = layer_facts(config, i)
        strategy = registry.build("strategy", name, **{k: v for k, v in args.options.items() if k in fields[name]})
        budget = percent(budget, max_tokens) if isinstance(budget, str) else budget
        slots = max_tokens if budget is None else budget
        positions = args.positions or strategy.positions
        if positions == "cache":
            if facts.rope_size % 2:
                raise ValueError(f"positions 'cache' needs an even number of rotated elements, not {facts.rope_size}.")
            if budget is None:
                slots = min(slots, context)
        if slots > context:
            what = "A dense cache" if not strategy.evicts else "A budget"
            hint = "; other strategies keep a budget, and sink goes on past it" if not strategy.evicts else ""
            raise ValueError(f"{what} of {slots} tokens is over the limit of {context}: the model's context{hint}.")
        window = facts.window
        if window is not None and slots >= window:  # nothing beyond the window is ever attended to
            strategy, slots, sinks, recent = registry.build("strategy", "window"), window, 0, 0
        elif window is not None and positions == "absolute":  # a sink beyond the window is never attended to either
            sinks = 0
        elif window is not None:  # inside the cache all tokens are nearer than the window
            window = None
        own = strategy.protected(slots)  # defaults, which give way to what the user says
        if sinks is None:
            sinks = own[0] if budget is not None else min(own[0], slots - 1)
        recent = min(own[1], max(0, slots - sinks)) if recent is None else recent
        if sinks >= slots:
            raise ValueError(f"The budget must be more than the sinks: budget {slots}, sinks {sinks} ({name}).")
        if sinks + recent > slots:
            raise ValueError(f"sinks {sinks} + recent {recent} exceed the budget of {slots} ({name}).")
        plans.append(Plan(facts, strategy, slots, sinks, recent, kind, positions, window))
    return plans


def limit_of(plans: list[Plan], context: int) -> tuple[int | None, str]:
    """The most tokens a row may see, and why; None if there is no end."""
    limits = [
        (p.slots, "a dense cache keeps every token; other strategies keep a budget")
        for p in plans
        if not p.strategy.evicts
    ]
    limits += [
        (context, "the model's context; only positions inside the cache, as sink has them, go on")
        for p in plans
        if not p.endless
    ]
    return min(limits, default=(None, ""))

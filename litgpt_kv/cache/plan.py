"""What the user's arguments come to for each layer, resolved and checked before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from safetensors import SafetensorError

from litgpt.config import Config
from litgpt_kv import registry
from litgpt_kv.cache.calibration import read_tensors
from litgpt_kv.cache.spec import LayerSpec, layer_spec
from litgpt_kv.cache.strategies.base import Strategy
from litgpt_kv.config import PATTERNS, KVCacheArgs, per_layer, percent

STEEPNESS = 20  # of a pyramid: the layer with least has the mean divided by this (PyramidKV's beta, arXiv 2406.02069)


@dataclass(frozen=True)
class LayerPlan:
    """One layer's choices, resolved and checked.

    Attributes:
        spec: The layer. strategy: What is kept. slots: Tokens a set keeps, the budget.
        sinks, recent: First positions and last tokens that are never evicted.
        interval: Tokens that leave together. keep_prompt: Whether prompts are never evicted.
        select: "head", "layer", "pool" or "model". pools: Pools of a layer, 0 without any.
        floor: Tokens a head of a pool keeps.
        storage: Name of the storage. positions: "absolute" or "cache". window: Sliding window of the layer, or None.
    """

    spec: LayerSpec
    strategy: Strategy
    slots: int
    sinks: int
    recent: int
    interval: int
    keep_prompt: bool
    select: str
    pools: int
    floor: int
    storage: str
    positions: str
    window: int | None

    @property
    def stores_unrotated(self) -> bool:
        """Whether keys are stored unrotated: their positions change with every eviction."""
        return self.positions == "cache" and not self.strategy.recency

    @property
    def endless(self) -> bool:
        """Whether positions may pass the model's context."""
        return self.positions == "cache" and self.strategy.evicts

    @property
    def exact_blocks(self) -> bool:
        """Whether a block of tokens gives what they give one at a time: what stays does not depend on attention."""
        return self.strategy.recency and (not self.strategy.evicts or (self.interval == 1 and not self.keep_prompt))

    @property
    def stack_key(self) -> tuple:
        """Layers with the same key keep their books together, and with `select` "model" their tokens."""
        storage = self.storage if self.select == "model" else ""
        return (replace(self, spec=replace(self.spec, index=0), storage=storage),)

    @property
    def sure(self) -> int:
        """With `select` "model": tokens of a long prompt that every head keeps, so that its layer can evict later."""
        return max(self.floor, self.sinks + self.recent) + self.interval

    @property
    def longest_block(self) -> int:
        """The most tokens of one decode step."""
        return max(1, (self.sure if self.select == "model" else self.slots) - self.sinks)


def resolve(config: Config, args: KVCacheArgs, max_tokens: int, context: int) -> list[LayerPlan]:
    """One plan a layer.

    Args:
        config: Of the model. args: What the user asked for.
        max_tokens: How many tokens a row may see. context: Positions in the model's rope tables.

    Raises:
        ValueError: If the arguments contradict each other; the message has the value and the limit.
    """
    n = config.n_layer
    values = [per_layer(name, getattr(args, name), n) for name in ("strategy", "budget", "sinks", "recent", "storage")]
    values[1] = [percent(b, max_tokens) if isinstance(b, str) else b for b in values[1]]
    if args.budget_pattern is not None:
        if args.select == "model":
            raise ValueError(f"select 'model' deals out the budget itself, not by a pattern: {args.budget_pattern!r}.")
        values[1] = pattern(args.budget_pattern, values[1][0], n, max_tokens)
    options = {name: registry.options("strategy", name) for name in dict.fromkeys(values[0])}
    if unknown := [k for k in args.options if not any(k in own for own in options.values())]:
        registry.build("strategy", values[0][0], **{unknown[0]: None})  # says what there is
    stores = dict.fromkeys(values[4])
    if unknown := [k for k in args.storage_options if not any(k in registry.options("storage", s) for s in stores)]:
        registry.build("storage", values[4][0], **{unknown[0]: None})  # says what there is
    plans = []
    for index, (name, budget, sinks, recent, storage) in enumerate(zip(*values)):
        strategy = registry.build("strategy", name, **{k: v for k, v in args.options.items() if k in options[name]})
        layer = _LayerArgs(name, strategy, budget, sinks, recent, storage)
        plans.append(_resolve_layer(layer_spec(config, index), args, layer, max_tokens, context))
    return plans


def ready_strategies() -> list[str]:
    """The names of strategies that run as they are: without a calibration file."""
    names = registry.names("strategy")
    return [name for name in names if "calibration" not in registry.build("strategy", name).needs]


def evicting_strategies() -> str:
    """The names of strategies that evict, which is what a budget is for, as a text."""
    return ", ".join(name for name in registry.names("strategy") if registry.get("strategy", name).evicts)


@dataclass(frozen=True)
class _LayerArgs:
    """What the user asked for one layer."""

    name: str
    strategy: Strategy
    budget: int | None
    sinks: int | None
    recent: int | None
    storage: str


def _resolve_layer(spec: LayerSpec, args: KVCacheArgs, layer: _LayerArgs, max_tokens: int, context: int) -> LayerPlan:
    strategy, sinks, recent = layer.strategy, layer.sinks, layer.recent
    interval, keep_prompt = args.interval, args.keep_prompt
    slots = max_tokens if layer.budget is None else layer.budget
    positions = args.positions or strategy.positions
    if positions == "cache":
        if spec.rope_size % 2:
            raise ValueError(f"positions 'cache' needs an even number of rotated elements, not {spec.rope_size}.")
        if layer.budget is None:
            slots = min(slots, context)
    if slots > context:
        what = "A dense cache" if not strategy.evicts else "A budget"
        hint = f"; {evicting_strategies()} keep a budget, and sink goes on past it" if not strategy.evicts else ""
        raise ValueError(f"{what} of {slots} tokens is over the limit of {context}: the model's context{hint}.")
    window = spec.window
    if window is not None and slots >= window and not strategy.outside_window:  # what is outside is never attended to
        strategy, slots, sinks, recent = registry.build("strategy", "window"), window, 0, 0
        interval, keep_prompt = 1, False
    elif window is not None and positions == "absolute":  # a sink beyond the window is never attended to either
        sinks = 0
    elif window is not None:  # inside the cache all tokens are nearer than the window
        window = None
    _check_defined(spec, layer.name, strategy)
    own_sinks, own_recent = strategy.protected(slots)  # defaults, which give way to what the user says
    if sinks is None:
        sinks = own_sinks if layer.budget is not None else min(own_sinks, slots - 1)
    recent = min(own_recent, max(0, slots - sinks)) if recent is None else recent
    if sinks >= slots:
        raise ValueError(f"The budget must be more than the sinks: budget {slots}, sinks {sinks} ({layer.name}).")
    if sinks + recent > slots:
        raise ValueError(f"sinks {sinks} + recent {recent} exceed the budget of {slots} ({layer.name}).")
    most = max(1, slots - sinks - recent)
    if strategy.evicts and interval > most:
        raise ValueError(
            f"interval {interval} is over the limit of {most}: budget {slots} less sinks {sinks} and recent {recent} "
            f"({layer.name})."
        )
    if registry.get("storage", layer.storage).in_order:
        check_in_order(layer.storage, layer.name, strategy, interval)
    select, pools, floor = _resolve_select(spec, args, layer.name, strategy, slots, interval)
    if select == "model" and not registry.get("storage", layer.storage).divisible:
        able = [n for n in registry.names("storage") if registry.get("storage", n).divisible]
        raise ValueError(
            f"select 'model' divides a storage among the layers, which {layer.storage!r} does not allow; storages that "
            f"do: {', '.join(able)}."
        )
    keep_prompt = keep_prompt and strategy.evicts
    return LayerPlan(
        spec,
        strategy,
        slots,
        sinks,
        recent,
        interval,
        keep_prompt,
        select,
        pools,
        floor,
        layer.storage,
        positions,
        window,
    )


def _check_defined(spec: LayerSpec, name: str, strategy: Strategy) -> None:
    """Refuse a strategy that does not know this kind of attention, or lacks its calibration."""
    if spec.latent and not strategy.latent:
        raise ValueError(f"{name} is not defined for multi-head latent attention (layer {spec.index}).")
    if "rope" in strategy.needs and spec.rope_size % 2:
        raise ValueError(f"{name} needs an even number of rotated elements, not {spec.rope_size}.")
    if "calibration" in strategy.needs and strategy.calibration is None:  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} needs a calibration file, option 'calibration': `litgpt_kv calibrate CHECKPOINT --text FILE --for "
            f"{name} --out FILE` makes it."
        )


def check_in_order(storage: str, name: str, strategy: Strategy, interval: int) -> None:
    """Refuse strategies whose tokens do not leave in order, for a storage that quantises neighbours together.

    Raises:
        ValueError: With the names.
    """
    if not strategy.recency:
        able = ", ".join(n for n in registry.names("strategy") if registry.get("strategy", n).recency)
        free = [n for n in registry.names("storage") if not registry.get("storage", n).in_order]
        raise ValueError(
            f"The storage {storage!r} quantises neighbouring tokens together, so they must leave in order, which those "
            f"of {name!r} do not. Strategies that do: {able}; storages that take any strategy: {', '.join(free)}."
        )
    if strategy.evicts and interval > 1:
        raise ValueError(
            f"With the storage {storage!r} tokens leave one at a time: interval must be 1, got {interval}."
        )


def _resolve_select(
    spec: LayerSpec, args: KVCacheArgs, name: str, strategy: Strategy, slots: int, interval: int
) -> tuple[str, int, int]:
    """Who chooses, how many pools a layer has, and how many tokens a head of a pool is sure of."""
    select = args.select or strategy.select
    if args.pools > 1 and select != "pool":
        raise ValueError(f"pools {args.pools} goes with select 'pool' only, not {select!r}.")
    shared = select == "model" or (select == "pool" and spec.groups > 1)
    if not shared or strategy.recency:  # recency: the same for all heads anyway
        return ("head" if select in ("pool", "model") else select), 0, 0
    if spec.groups % args.pools:
        raise ValueError(f"pools must divide the {spec.groups} key/value heads, got {args.pools} ({name}).")
    floor = int(args.floor * slots)
    if floor + interval > slots:
        raise ValueError(
            f"floor {args.floor:g} keeps {floor} tokens a head: with interval {interval} that is over the budget of "
            f"{slots} ({name})."
        )
    return select, args.pools, floor


def pattern(name: str, budget: int, layers: int, most_tokens: int = 2**31) -> list[int]:
    """Budgets of the layers, `layers` times `budget` in sum: a straight line from most to least, or what a file says.

    "pyramid" has most in the first layer, as PyramidKV (arXiv 2406.02069, Zefan-Cai/KVCache-Factory), "funnel" in the
    last one. The layer with least has `budget / 20`, and all have at least 1; PyramidKV adds its window on top and goes
    back to equal budgets for short prompts, which a cache of a fixed size cannot. A file has the share of each layer
    relative to the mean, of which at least `1 / 20` is given; no layer gets more than `most_tokens`.
    """
    if layers == 1:
        return [budget]
    if name not in PATTERNS:
        return spread_budget(budget_shares(name, layers), budget, most_tokens)
    least = budget / STEEPNESS
    most = 2 * budget - least
    line = [most - (most - least) * layer / (layers - 1) for layer in range(layers)]
    budgets = [max(1, round(x)) for x in line]
    budgets[0] += layers * budget - sum(budgets)  # what rounding lost or won
    return budgets if name == "pyramid" else budgets[::-1]


def budget_shares(path: str, layers: int) -> list[float]:
    """The share of each layer that a calibration file for budgets says, the mean over its heads.

    Raises:
        ValueError: If the file is missing or is not one of a model with so many layers.
    """
    try:
        found = read_tensors(path, [f"layers.{i}.share" for i in range(layers)])
        if any(x.dim() != 1 or not x.numel() or (x < 0).any() for x in found.values()):
            raise ValueError("its shares must be numbers of 0 or more, one a head")
        shares = [float(share.mean()) for share in found.values()]
        if not sum(shares) > 0:
            raise ValueError("its shares are all 0")
        return shares
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} has no budgets for {layers} layers: {error}. `litgpt_kv calibrate CHECKPOINT --text FILE --for "
            "budgets --out FILE.safetensors` makes it."
        ) from error


def spread_budget(shares: list[float], budget: int, most: int) -> list[int]:
    """Whole budgets in proportion to shares, `len(shares)` times `budget` in sum, each from 1 to `most`."""
    total, least = len(shares) * budget, max(1, round(budget / STEEPNESS))
    most = max(most, budget)
    mean = sum(shares) / len(shares)
    budgets = [min(most, max(least, round(budget * share / mean))) for share in shares]
    by_share = sorted(range(len(shares)), key=lambda i: -shares[i])
    while missing := total - sum(budgets):  # what rounding and the limits lost or won
        step = 1 if missing > 0 else -1
        open_ = [i for i in by_share if least <= budgets[i] + step <= most]
        for i in open_[: abs(missing)]:
            budgets[i] += step
    return budgets


def limit_of(plans: list[LayerPlan], context: int) -> tuple[int | None, str]:
    """The most tokens a row may see, and why; None if there is no end."""
    limits = [
        (p.slots, f"a dense cache keeps every token; {evicting_strategies()} keep a budget")
        for p in plans
        if not p.strategy.evicts
    ]
    limits += [
        (context, "the model's context; only positions inside the cache, as sink has them, go on")
        for p in plans
        if not p.endless
    ]
    return min(limits, default=(None, ""))


def check_prompt_kept(plans: list[LayerPlan], length: int) -> None:
    """Refuse a prompt that is to be kept and does not leave room to evict.

    Raises:
        ValueError: With the numbers.
    """
    for plan in plans:
        if plan.keep_prompt and max(length, plan.sinks) + plan.recent + plan.interval > plan.slots:
            raise ValueError(
                f"keep_prompt needs a budget of at least {max(length, plan.sinks) + plan.recent + plan.interval}: "
                f"prompt {length} + recent {plan.recent} + interval {plan.interval}; the budget is {plan.slots}."
            )


def check_reread(plans: list[LayerPlan], length: int, context: int) -> None:
    """Refuse a prompt that must be read twice and leaves no room for its second reading.

    Raises:
        ValueError: With the numbers.
    """
    for plan in plans:
        if plan.strategy.rereads and length > plan.slots:
            chunk = plan.strategy.chunk  # type: ignore[attr-defined]
            if length + min(chunk, length) > context:
                raise ValueError(
                    f"A prompt of {length} tokens, read again {min(chunk, length)} tokens at a time, is over the limit "
                    f"of {context}: the model's context. A smaller `chunk` needs less."
                )

"""The settings of a cache, `KVCacheArgs`, and of sampling, `SamplingArgs`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from litgpt_kv import registry

T = TypeVar("T")
SELECTS = (None, "head", "layer", "pool", "model")
PATTERNS = (None, "pyramid", "funnel")
OptionValue = bool | int | float | str | None  # a strategy's option; with Any, a YAML file could name code to run
MAX_TEMPERATURE = 1e30  # logits divided by it are still normal float32 numbers


def shown(value: Any) -> str:
    """Return a value as text for an error message, at most 60 characters."""
    try:
        text = repr(value)
    except Exception:  # an integer with too many digits for Python to print, or an object whose repr fails
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_type(name: str, value: Any, kinds: type | tuple[type, ...], what: str) -> None:
    """Raise TypeError with a readable message if a value has another type than `kinds`."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {what}, got {shown(value)}.")


def check_callable(name: str, value: Any) -> None:
    """Raise TypeError if a value is neither callable nor None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None, got {shown(value)}.")


@dataclass(frozen=True)
class KVCacheArgs:
    """Which tokens a cache keeps, how many, how they are stored, and which positions the rotary embedding sees.

    Args:
        strategy: Which tokens are kept: a registered name (`litgpt_kv strategies` lists them), or a strategy of your
            own, my_file.py:MyStrategy.
        budget: How many tokens each row, layer and head keeps, including the one that is decoded. None: `max_tokens`.
            "20%", or the fraction 0.2, is that share of `max_tokens`.
        sinks: Never evict the first so many positions. None: the strategy's own default.
        recent: Never evict the last so many tokens, including the one that is decoded. None: the strategy's own
            default.
        storage: How keys and values are stored: a registered name.
        interval: Evict so many tokens at once when a row is full, so that a costly score is computed only once in so
            many steps; a full row holds between `budget - interval + 1` and `budget` tokens.
        keep_prompt: Never evict a row's prompt. The prompt must leave room in the budget.
        select: Where scores are compared: "head" (each key/value head evicts for itself), "layer" (all heads of a layer
            keep the same tokens), "pool" (the heads of a layer share their slots) or "model" (all heads of all layers
            share the slots: a prompt longer than the budget deals them out, afterwards each layer is a pool of what it
            got). None: the strategy's own default.
        floor: With select "pool" or "model", the share of the budget that every head keeps in any case.
        pools: With select "pool", the number of pools in a layer; each has the same number of neighbouring heads.
        budget_pattern: Give layers different budgets with the same total: "pyramid" (most to the first layers),
            "funnel" (most to the last ones), or a file that `litgpt_kv calibrate --for budgets` made, FILE.safetensors
            (what each layer deserves). None: the same for all.
        attention: The kernel for decode steps: a registered name. None: the best one for the device and the storage.
        positions: "absolute" (a token keeps its position in the text) or "cache" (positions count the kept tokens, so
            that a text may be longer than the model's context). None: the strategy's own default.
        options: The strategy's own parameters, by name.
        storage_options: The storage's own parameters, by name.

    `strategy`, `budget`, `sinks`, `recent` and `storage` may each be a list with one value for each layer.
    """

    strategy: str | Sequence[str] = "dense"
    budget: int | float | str | None | Sequence[int | float | str | None] = None
    sinks: int | None | Sequence[int | None] = None
    recent: int | None | Sequence[int | None] = None
    storage: str | Sequence[str] = "plain"
    interval: int = 1
    keep_prompt: bool = False
    select: str | None = None
    floor: float = 0.2
    pools: int = 1
    budget_pattern: str | None = None
    attention: str | None = None
    positions: str | None = None
    options: dict[str, OptionValue | list[OptionValue]] = field(default_factory=dict)
    storage_options: dict[str, OptionValue | list[OptionValue]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, kv_cache: str | Mapping[str, Any] | KVCacheArgs | None, budget: int | float | str | None = None
    ) -> KVCacheArgs | None:
        """Return `kv_cache` as KVCacheArgs, with `budget` if it is given; None for None or "none".

        A mapping is read as in a YAML file: {"strategy": "snapkv", "budget": "20%", "window": 32}. A strategy of your
        own, "my_file.py:MyStrategy", is imported, which runs the file: do not pass on text from people whom you do not
        trust.

        Raises:
            TypeError: If `kv_cache` has another type.
            ValueError: If "none" comes with options or a budget, or a strategy's file cannot be imported.
        """
        args = cls(strategy=kv_cache) if isinstance(kv_cache, str) else kv_cache
        if isinstance(args, Mapping):
            args = cls(**cache_fields(args))
        if not (args is None or isinstance(args, KVCacheArgs)):
            what = "a strategy's name, a mapping of options, KVCacheArgs or None"
            raise TypeError(f"kv_cache must be {what}, got {shown(kv_cache)}.")
        if args is not None and args.strategy == "none":
            if args != cls(strategy="none"):
                raise ValueError("kv_cache 'none' takes no options.")
            args = None
        if budget is not None and args is None:
            raise ValueError(f"A budget needs a cache, got budget {shown(budget)} and no cache.")
        if args is not None and any(map(registry.is_file_name, _each(args.strategy))):
            names = [registry.import_named(name) for name in _each(args.strategy)]
            args = replace(args, strategy=names[0] if isinstance(args.strategy, str) else names)
        return args if budget is None else replace(args, budget=budget)

    def resolved(self, max_tokens: int) -> KVCacheArgs:
        """Return a copy in which a percentage is replaced by that share of `max_tokens`, as a number of tokens."""
        counts = [percent(b, max_tokens) if isinstance(b, str) else b for b in _each(self.budget)]
        return replace(self, budget=counts if isinstance(self.budget, (list, tuple)) else counts[0])

    def __post_init__(self) -> None:
        budgets = [_share(value) for value in _each(self.budget)]
        if budgets != list(_each(self.budget)):
            object.__setattr__(self, "budget", budgets if _each(self.budget) is self.budget else budgets[0])
        if self.positions not in (None, "absolute", "cache"):
            raise ValueError(f"positions must be 'absolute' or 'cache', got {shown(self.positions)}.")
        for name in ("strategy", "storage"):
            if not all(isinstance(value, str) for value in _each(getattr(self, name))) or not getattr(self, name):
                raise TypeError(f"{name} must be a name, or a list of names, got {shown(getattr(self, name))}.")
        for name in ("options", "storage_options"):
            value = getattr(self, name)
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise TypeError(f"{name} must be a dict of values by name, got {shown(value)}.")
        for name in ("budget", "sinks", "recent"):
            for value in _each(getattr(self, name)):
                _check_count(name, value)
        for name in ("interval", "pools"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise ValueError(f"{name} must be a whole number from 1 to 2**31 - 1, got {shown(value)}.")
        if not isinstance(self.keep_prompt, bool):
            raise ValueError(f"keep_prompt must be true or false, got {shown(self.keep_prompt)}.")
        if self.select not in SELECTS:
            raise ValueError(f"select must be 'head', 'layer', 'pool' or 'model', got {shown(self.select)}.")
        if isinstance(self.floor, bool) or not isinstance(self.floor, (int, float)) or not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be between 0 and 1, got {shown(self.floor)}.")
        file = isinstance(self.budget_pattern, str) and self.budget_pattern.endswith(".safetensors")
        if self.budget_pattern not in PATTERNS and not file:
            raise ValueError(
                "budget_pattern must be 'pyramid', 'funnel' or a file FILE.safetensors, got "
                f"{shown(self.budget_pattern)}."
            )
        if self.budget_pattern is not None and (self.budget is None or _each(self.budget) is self.budget):
            raise ValueError(f"A budget_pattern spreads one budget over the layers, got budget {shown(self.budget)}.")
        if not (self.attention is None or isinstance(self.attention, str)):
            raise TypeError(f"attention must be a kernel's name, got {shown(self.attention)}.")


def cache_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `KVCacheArgs` from a mapping in which the strategy's own options stand beside them.

    Raises:
        TypeError: If a key is not text.
    """
    for name in given:
        check_type("A key of kv_cache", name, str, "a text")
    names = [f.name for f in fields(KVCacheArgs)]
    own = {name: value for name, value in given.items() if name not in names}
    known = {name: value for name, value in given.items() if name in names}
    if own:
        options = known.get("options", {})
        known["options"] = {**options, **own} if isinstance(options, Mapping) else options
    return known


def split_name(text: str) -> tuple[str, str | None, str | None]:
    """Split the name of a cache to compare, NAME[:SELECT][@STORAGE]; NAME may be my_file.py:MyStrategy.

    Returns:
        The name of its strategy, which is imported if it is in a file; its select and its storage, None if not given.

    Raises:
        ValueError: If a strategy's file cannot be imported.
    """
    name, _, storage = text.partition("@")
    select = next((s for s in SELECTS if s and name.endswith(f":{s}")), None)
    return registry.import_named(name.removesuffix(f":{select}")), select, storage or None


def _share(budget: Any) -> Any:
    """Return a fraction between 0 and 1, a number or its text, as a percentage; any other value as it is."""
    if isinstance(budget, str) and not budget.endswith("%"):
        try:
            fraction = float(budget)
        except ValueError:
            return budget
    elif isinstance(budget, float):
        fraction = budget
    else:
        return budget
    return f"{100 * fraction:.12g}%" if 0 < fraction < 1 else budget


def _check_count(name: str, value: Any) -> None:
    if value is None:
        return
    if name == "budget" and isinstance(value, str):
        percent(value, 100)
    elif isinstance(value, bool) or not isinstance(value, int):
        or_fraction = " or a fraction between 0 and 1" if name == "budget" else ""
        raise ValueError(f"{name} must be a number of tokens{or_fraction}, got {shown(value)}.")
    elif value < (1 if name == "budget" else 0):
        raise ValueError(f"{name} must be at least {1 if name == 'budget' else 0}, got {shown(value)}.")
    elif value >= 2**31:
        raise ValueError(f"{name} must be less than 2**31 tokens, got {shown(value)}.")


def percent(text: str, of: int) -> int:
    """Return "20%" of `of` tokens as a number of tokens, at least 1."""
    try:
        share = float(text.removesuffix("%")) if text.endswith("%") else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share <= 100:
        raise ValueError(
            "budget must be a number of tokens, a percentage over 0% and up to 100%, or a fraction between 0 and 1, "
            f"got {shown(text)}."
        )
    return max(1, round(of * share / 100))


def _each(value: T | Sequence[T]) -> Sequence[T]:
    return value if isinstance(value, (list, tuple)) else [value]  # type: ignore[list-item]


def _spread(name: str, value: T | Sequence[T], count: int, what: str) -> list[T]:
    values = _each(value)
    if values is not value:
        return [*values] * count
    if len(values) != count:
        raise ValueError(
            f"{name} has {len(values)} values for {count} {what}s: give one value, or one for each {what}."
        )
    return list(values)


def per_layer(name: str, value: T | Sequence[T], n_layer: int) -> list[T]:
    """Return a list with one value for each layer, from one value for all or a list of `n_layer` values."""
    return _spread(name, value, n_layer, "layer")


def per_row(name: str, value: T | Sequence[T], batch_size: int) -> list[T]:
    """Return a list with one value for each row, from one value for all or a list of `batch_size` values."""
    return _spread(name, value, batch_size, "row")


@dataclass(frozen=True)
class SamplingArgs:
    """How the next token is chosen from the logits. Names and meaning are as in litgpt.

    Args:
        temperature: Divides the logits; higher is more random, 0 takes the most probable token (greedy). None: the
            value in the checkpoint's generation_config.json, else 0.8; without a checkpoint 1.0.
        top_k: Sample only among so many most probable tokens; null (None) for all.
        top_p: Sample among the smallest set of tokens whose probabilities sum to more than this; 1.0: among all,
            0.0: greedy.
        seed: Makes a row repeatable, and independent of the other rows. None: use torch's global generator.
        repetition_penalty: Divides the positive logits of tokens that occur in the prompt or the text, and multiplies
            the negative ones, before all other settings (Keskar et al. 2019, arXiv 1909.05858; as in Hugging Face's
            generate).
        min_p: Sample among the tokens that have at least this share of the most probable token's probability, after
            temperature (Nguyen et al. 2024, arXiv 2407.01082; as in vLLM and Hugging Face's generate); 0.0: among all.
        frequency_penalty: Subtracted from the logit of a token as often as the new text has it, after the repetition
            penalty; negative values favour it (as in OpenAI's API). The prompt does not count.
        presence_penalty: Subtracted once from the logits of all tokens that the new text has.

    Each may be one value for all rows, or a list with one value for each row.
    """

    temperature: float | None | Sequence[float | None] = 1.0
    top_k: int | None | Sequence[int | None] = None
    top_p: float | Sequence[float] = 1.0
    seed: int | None | Sequence[int | None] = None
    repetition_penalty: float | Sequence[float] = 1.0
    min_p: float | Sequence[float] = 0.0
    frequency_penalty: float | Sequence[float] = 0.0
    presence_penalty: float | Sequence[float] = 0.0

    def __post_init__(self) -> None:
        for name, (kind, least, most, says) in SAMPLING_LIMITS.items():
            for value in _each(getattr(self, name)):
                if value is None and name in ("temperature", "top_k", "seed"):
                    continue
                if isinstance(value, bool) or not isinstance(value, kind):
                    what = "whole number" if kind is int else "number"
                    raise ValueError(f"{name} must be a {what}, got {shown(value)}.")
                if not least <= value <= most:  # NaN is refused, too
                    upper = f", at most {most:.3g}" if value > most and says in ("0 or greater", "at least 1") else ""
                    raise ValueError(f"{name} must be {says}{upper}, got {shown(value)}.")

    def resolved(self, temperature: float) -> SamplingArgs:
        """Return a copy in which a temperature of None is replaced by the checkpoint's."""
        values = [temperature if value is None else value for value in _each(self.temperature)]
        return replace(self, temperature=values if isinstance(self.temperature, (list, tuple)) else values[0])

    def shifted(self, number: int) -> SamplingArgs:
        """Return a copy with the seed of sample (or turn) `number`, from 0: seed + number, modulo 2**63."""
        seeds = [None if seed is None else (seed + number) % 2**63 for seed in _each(self.seed)]
        return replace(self, seed=seeds if isinstance(self.seed, (list, tuple)) else seeds[0])

    def rows(self, count: int) -> list[SamplingArgs]:
        """Return one copy for each of `count` rows, each with single values."""
        names = [f.name for f in fields(self)]
        return [SamplingArgs(*row) for row in zip(*(per_row(name, getattr(self, name), count) for name in names))]


SAMPLING_LIMITS: dict[str, tuple[Any, float, float, str]] = {  # type, least, most, in words
    "temperature": ((int, float), 0, MAX_TEMPERATURE, "0 or greater"),
    "top_k": (int, 1, 2**63 - 1, "at least 1"),
    "top_p": ((int, float), 0, 1, "between 0 and 1"),
    "seed": (int, 0, 2**63 - 1, "0 to 2**63 - 1"),
    "repetition_penalty": ((int, float), 0.01, 100, "between 0.01 and 100"),
    "min_p": ((int, float), 0, 1, "between 0 and 1"),
    "frequency_penalty": ((int, float), -2, 2, "between -2 and 2"),
    "presence_penalty": ((int, float), -2, 2, "between -2 and 2"),
}

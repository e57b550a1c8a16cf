"""What a cache keeps: one file a family of strategies."""

from litgpt_kv.cache.strategies import base as base

"""How keys and values are stored."""

from litgpt_kv.cache.storage import plain as plain

"""The old path of `litgpt_kv.compat.install`."""

from litgpt_kv.compat.install import install

__all__ = ["install"]

"""Other libraries that run the same model, for `litgpt_kv benchmark --peers`.

Read in this order: `base.py` says what a library gives (`Peer`, `Variant`), `ours.py` and `litgpt_cache.py` are short
examples, `run.py` measures all of them in one interleaved run, `report.py` and `picture.py` show what was measured.
A new library is a file here with a class decorated with `@register("peer", "name")`, and its import below.
"""

from litgpt_kv.benchmark.peers import litgpt_cache, llama_cpp_batch, open_vino, transformers_caches

__all__ = ["litgpt_cache", "llama_cpp_batch", "open_vino", "transformers_caches"]

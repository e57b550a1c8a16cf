"""Compatibility with litgpt's own code: `input_pos`, `set_kv_cache`, and our classes installed in litgpt's modules."""

"""What a cache costs in quality: questions about long texts, and the difference from a full cache.

In the order to read: `tasks` (examples from a seed), `answering` (contexts into a cache, questions after or inside),
`shadow` and `fidelity` (perplexity, KL, lost attention, step by step), `candidates` (which caches), `results` and
`picture`.
"""

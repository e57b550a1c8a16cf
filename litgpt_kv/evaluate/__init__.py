"""What a cache costs in quality: questions about long texts, and the difference from a full cache.

In the order to read: `tasks` (examples from a seed), `recording` (prompts read once for all caches), `answering`
(contexts into a cache, questions after or inside), `shadow` and `fidelity` (perplexity, KL, lost attention, step by
step), `candidates` (which caches), `runs` (cells that are not there yet), `results`, `report` and `picture`;
`recommend` chooses for a user.
"""

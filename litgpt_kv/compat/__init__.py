"""litgpt's own ways to call a model: positions from the caller, attached caches, our classes in litgpt's place."""

"""Checkpoints in litgpt's layout from GGUF files.

Read in this order: `gguf_file` (the container: metadata and tensors, checked), `configs` (metadata to litgpt's Config),
`weights` (tensors to `lit_model.pth`), `tokenizer` and `pre_tokenizers`, `templates` (the chat template to a prompt
style; the template runs in a process of its own, `render`), and `checkpoint`, which does all of it.
"""

"""A checkpoint, its tokenizer and a conversation."""

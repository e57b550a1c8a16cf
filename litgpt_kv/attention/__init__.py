"""Attention as functions of tensors: rope and YaRN, masks, and the eager products."""

"""What a cache keeps: one file a family of strategies."""

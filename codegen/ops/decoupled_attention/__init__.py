"""Attention whose keys and values have different numbers of heads."""

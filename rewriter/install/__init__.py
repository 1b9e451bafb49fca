"""Doors out: each edits the original, only at matched sites."""

"""Sequence mixers and blocks: one file per layer."""

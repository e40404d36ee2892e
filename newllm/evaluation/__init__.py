"""Measurements on a finished run: one file per measurement."""

"""Typed configuration: schemas, composition, errors in plain words."""

"""Language models: one file per architecture."""

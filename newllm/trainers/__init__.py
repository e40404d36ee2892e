"""Training procedures: one LightningModule per file."""

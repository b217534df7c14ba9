"""Pretraining: configuration, source tables, the training module, the run and its report."""

"""Batch prediction's engine: inputs cut into units, worker processes, values kept by content."""

"""Predictions into a folder of parts, by one process or by many, that survive an interruption."""

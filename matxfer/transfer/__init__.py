"""Plugins: freezing, the prefix cache, elastic weight consolidation, fine-tuning, plugin files."""

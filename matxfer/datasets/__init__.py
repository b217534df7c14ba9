"""Public datasets: cards that say where they are, the download, and the way into our tables."""

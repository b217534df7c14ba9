"""Domain-invariant features: distances between domains, and the callback that makes them small."""

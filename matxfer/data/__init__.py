"""Property tables, units, splits, and the packed graph store that training reads from."""

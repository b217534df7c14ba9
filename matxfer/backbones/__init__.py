"""Backbones of other packages: each module a thin face over one, imported only where it is used."""

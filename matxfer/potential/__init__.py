"""The backbone as an interatomic potential: energies as sums over atoms, forces and stresses."""

"""What transfer is worth: small tasks beside published results, learning curves, forgetting."""

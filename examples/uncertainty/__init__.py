"""Does a network know what it does not know? Monte Carlo dropout on corrupted digits."""

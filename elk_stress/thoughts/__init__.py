"""Moves of activations: from a prepared testbed to bits, attacks, audit and result."""

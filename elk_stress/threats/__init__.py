"""What a number of bits is relative to: threat, prior, tails and their fit."""

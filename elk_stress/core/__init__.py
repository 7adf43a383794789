"""What every room stands on: bits, flags, seeds, settings, inputs, arrays, the registry, files."""

"""What every room stands on: bits, flags, settings, inputs, arrays, the registry, files."""

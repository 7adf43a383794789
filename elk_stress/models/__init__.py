"""Real models: found, loaded as data, read at a site, moved, prefixed, recoded, adapted."""

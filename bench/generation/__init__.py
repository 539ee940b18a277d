"""How fast tokens are generated: with a cache and without, by beams, and with a draft."""

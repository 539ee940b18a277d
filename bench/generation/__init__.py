"""How fast tokens are generated, with and without a cache."""

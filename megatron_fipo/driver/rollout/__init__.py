"""How the driver gets the groups of an iteration: engine pool, dynamic sampling, prompt groups, dumps."""

"""How the driver gets the groups of an iteration: engine pool, replies, groups of responses, dynamic sampling, dumps."""

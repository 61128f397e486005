"""Time of each phase of an iteration, from a case alone: arithmetic over the machine's figures."""

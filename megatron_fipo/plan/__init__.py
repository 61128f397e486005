"""The dry run: what a configuration needs, computed without starting anything."""

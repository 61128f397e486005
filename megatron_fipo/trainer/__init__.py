"""One trainer rank: a Ray actor with its share of the model and optimizer. `protocol.py` is its interface."""

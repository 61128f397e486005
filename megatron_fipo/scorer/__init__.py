"""One scorer: a Ray actor that turns the responses of a group into scores. `protocol.py` is its interface."""

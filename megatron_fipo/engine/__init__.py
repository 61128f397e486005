"""One rollout engine: a Ray actor that samples responses, the protocol of engines, and their registry."""

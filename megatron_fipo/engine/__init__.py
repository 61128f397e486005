"""One rollout engine: a Ray actor that samples responses, and the protocol that engines follow."""

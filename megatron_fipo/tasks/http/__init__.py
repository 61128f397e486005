"""The reward `http`: a server of the user scores the responses."""

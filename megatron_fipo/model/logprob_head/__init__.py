"""The output layer: log-probs and entropy of response tokens without keeping the logits."""

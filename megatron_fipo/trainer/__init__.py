"""One trainer rank: a Ray actor that holds its share of the model and optimizer."""

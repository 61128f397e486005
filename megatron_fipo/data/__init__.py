"""Problems: where they come from (`registry.load_datasets`) and the order in which training sees them (`dataset.Dataset`)."""

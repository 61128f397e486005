"""What a run will need, before anything starts: figures of the model, memory and work of each rank."""

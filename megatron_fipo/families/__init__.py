"""Model families: a Hugging Face config as an `Architecture`, and the names and layouts of its weights. No torch modules."""

"""How the local engine decodes: `dynamic` with a growing cache, `static` with fixed tensors and CUDA graphs."""

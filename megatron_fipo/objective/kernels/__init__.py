"""Triton kernels of the loss and the head, and the choice between them and plain torch."""

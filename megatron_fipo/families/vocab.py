"""How many rows the embedding and the output layer hold."""


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """The vocabulary rounded up so that every tensor-parallel rank holds the same number of rows.

    Vocabularies above 1,024 are padded to 128 rows per rank, which keeps matrix kernels fast; smaller ones (test models) only
    as they must be. Padding rows exist in memory alone: no checkpoint holds them, and the head never scores them.
    """
    rows_per_rank = 128 if vocab_size > 1024 else 1
    multiple = rows_per_rank * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple

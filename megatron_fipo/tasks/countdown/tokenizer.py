"""A character-level tokenizer for small tasks, in Hugging Face's `AutoTokenizer` format: 32 symbols for countdown."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = "0123456789+-*=;#,:/().?!|_~&@"
"""Those of countdown, the characters of the task first.

The others fill the vocabulary to 32, which tensor-parallel ranks can share evenly. There is no space, because
the tokenizer class that transformers forces on some model types encodes it differently.
"""


def build_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token per character, after three for padding, end of sequence and unknown characters.

    Encoding adds no special tokens, decoding no spaces; unknown characters become `<unk>`.
    """
    vocabulary = {symbol: index for index, symbol in enumerate([PAD, EOS, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def save_tokenizer(folder: str | Path, characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """Write tokenizer.json and tokenizer_config.json into `folder` and return the tokenizer."""
    tokenizer = build_tokenizer(characters)
    tokenizer.save_pretrained(str(folder))
    return tokenizer

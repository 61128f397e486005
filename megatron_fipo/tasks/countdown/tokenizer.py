"""A character-level tokenizer of 32 symbols for the countdown task, saved as Hugging Face `AutoTokenizer` reads it."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = "0123456789+-*=;#,:/().?!|_~&@"
"""Those of the task first. The rest round the vocabulary up to 32, which splits evenly over tensor-parallel ranks; no space,
since the tokenizer class that transformers forces on some model types spells it differently."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character. Encoding adds no special tokens, decoding no spaces; other characters become `<unk>`."""
    vocabulary = {symbol: index for index, symbol in enumerate([PAD, EOS, UNKNOWN, *CHARACTERS])}
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


def save_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Writes tokenizer.json and tokenizer_config.json into `folder` and returns the tokenizer."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(str(folder))
    return tokenizer

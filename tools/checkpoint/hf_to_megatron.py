"""Hugging Face folder to Megatron checkpoint folder: `megatron-fipo convert to-megatron` as a script.

python tools/checkpoint/hf_to_megatron.py SRC DST [--dtype bfloat16|float32|keep]
"""

import sys

from megatron_fipo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-megatron", *sys.argv[1:]]))

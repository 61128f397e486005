"""Megatron checkpoint folder to Hugging Face folder: `megatron-fipo convert to-hf` as a script.

python tools/checkpoint/megatron_to_hf.py SRC DST [--dtype bfloat16|float32|keep]
"""

import sys

from megatron_fipo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-hf", *sys.argv[1:]]))

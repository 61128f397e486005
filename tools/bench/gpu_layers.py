"""A training step of six layers of the 32B model's shape, with its output layer, on packs of 20,480 tokens.

python -m tools.bench.gpu_layers "FP8 blockwise"    # one case: the memory of a model is not free for the next for certain
"""

from tests.gpu.policies import Shape
from tools.bench.gpu_step import case
from tools.bench.harness import Cases, run_cases

LAYERS = Shape(6, 5_120, 27_648, 40, 8, 152_064, tied=False)
NAME = "6 layers of 32B"
CASES: Cases = {
    "BF16": case(NAME, LAYERS),
    "FP8 blockwise": case(NAME, LAYERS, "blockwise"),
    "FP8 tensorwise": case(NAME, LAYERS, "tensorwise"),
}

if __name__ == "__main__":
    run_cases(__doc__, "layers", CASES)

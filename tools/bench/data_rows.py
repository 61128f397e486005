"""Time and peak memory of reading training rows: repeated prompts, as the published file of DAPO has them, and distinct ones.

python -m tools.bench.data_rows             # 1.8 million rows: about half an hour
python -m tools.bench.data_rows --rows 100000
"""

import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_fipo.tasks.countdown.tokenizer import build_tokenizer
from megatron_fipo.tasks.prompt_encoder import PromptEncoder
from megatron_fipo.tasks.prompt_file import RowSettings, read_problems
from tools.bench.harness import heading, in_own_process, measurement, parser, table

ROWS, DISTINCT = 1_791_700, 17_398
"""Of the published file."""
CHARACTERS = 400
"""Of a prompt; the tokenizer of the bundled model makes a token of each, which is about four times as many as usual."""
AT_ONCE = 20_000


def rows(count: int, distinct: int) -> Iterator[dict[str, Any]]:
    """Rows in the form of the published file; row n has the prompt n modulo `distinct`."""
    random_text = "".join(random.Random(1).choices("0123456789+-*=", k=CHARACTERS * 50))
    for number in range(count):
        prompt = number % distinct
        start = prompt % (CHARACTERS * 49)
        text = f"{prompt}={random_text[start : start + CHARACTERS]}"
        yield {
            "data_source": "math_dapo",
            "prompt": [{"content": text, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(prompt % 1000), "style": "rule"},
            "extra_info": {"index": f"problem-{number}"},
        }


def write(path: Path, count: int, distinct: int) -> None:
    """Write the file in the format that its name ends with."""
    writer, part = None, []
    with path.open("wb") as file:
        for row in rows(count, distinct):
            if path.suffix == ".jsonl":
                file.write(json.dumps(row).encode() + b"\n")
                continue
            part.append(row)
            if len(part) == AT_ONCE:
                writer = _append(file, writer, part)
                part = []
        if part:
            writer = _append(file, writer, part)
        if writer is not None:
            writer.close()


def _append(file: Any, writer: Any, part: list[dict[str, Any]]) -> Any:
    batch = pyarrow.Table.from_pylist(part)
    writer = writer or pyarrow.parquet.ParquetWriter(file, batch.schema)
    writer.write_table(batch)
    return writer


def read(path: str, keep_columns: str) -> dict[str, float]:
    """Seconds, GiB above those of the imports, and problems."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    settings = RowSettings(path, Path(path).suffix[1:], keep_columns=keep_columns == "columns")
    encode = PromptEncoder(build_tokenizer(), 4096, datetime(2026, 1, 1))
    problems = read_problems(settings, encode, lambda line: print(line, file=sys.stderr))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": time.perf_counter() - start,
        "gib": peak / 2**20,
        "above_imports": (peak - before) / 2**20,
        "problems": len(problems),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=ROWS)
    options.add_argument("--measure", nargs=2, help="a child's part: FILE columns|none")
    arguments = options.parse_args()
    if measurement(read, arguments.measure):
        return
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("parquet", "jsonl"):
            for distinct in (DISTINCT, arguments.rows):
                path = Path(folder) / f"rows.{name}"
                write(path, arguments.rows, distinct)
                for columns in ("none", "columns"):
                    found = in_own_process("tools.bench.data_rows", path, columns)
                    lines.append(
                        [
                            name,
                            f"{path.stat().st_size / 2**20:,.0f} MiB",
                            f"{arguments.rows:,}",
                            f"{found['problems']:,.0f}",
                            columns,
                            f"{found['seconds']:.0f} s",
                            f"{found['gib']:.2f} GiB, {found['above_imports']:.2f} GiB of it after imports",
                        ]
                    )
                    print(lines[-1], flush=True)
                path.unlink()
    print(heading())
    print(table(("format", "size", "rows", "problems", "columns kept", "time", "peak memory"), lines))


if __name__ == "__main__":
    main()

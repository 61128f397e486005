"""Writes the table of metrics in docs/algorithm.md from the list in objective/metrics.py.

python -m tools.metrics_table
"""

from pathlib import Path

from megatron_fipo.objective.metrics import markdown_table

PAGE = Path(__file__).parents[1] / "docs" / "algorithm.md"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    head, start, rest = text.partition("<!-- metrics:start")
    comment, _, rest = rest.partition("-->\n")
    _, end, tail = rest.partition("<!-- metrics:end")
    PAGE.write_text(f"{head}{start}{comment}-->\n\n{markdown_table()}\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()

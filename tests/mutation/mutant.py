"""One fault, as a replacement of source text."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    """Inside the package."""
    old: str
    """Must occur exactly once."""
    new: str
    caught_by: tuple[str, ...]
    """Beginnings of test ids below `tests/`; a case of each must fail."""

    def stale(self) -> str | None:
        """Why the entry does not fit the sources, if so."""
        path = ROOT / "megatron_fipo" / self.file
        count = path.read_text().count(self.old) if path.exists() else 0
        if count == 1:
            return None
        found = f"{count} times, not once," if count else "not"
        return (
            f"{self.name}: the text to replace is {found} in {path.relative_to(ROOT)}: {self.old.strip()!r}"
        )

    def missing_tests(self) -> list[str]:
        """Those of `caught_by` whose file has no such function."""
        missing = []
        for beginning in self.caught_by:
            file, function = beginning.partition("[")[0].split("::")
            path = ROOT / "tests" / file
            if not path.exists() or f"def {function}" not in path.read_text():
                missing.append(f"{self.name}: no test {function} in tests/{file}")
        return missing

"""A calculator for countdown: whenever the model writes `=`, the next characters are the value."""

import re


def step(episode):
    """`3*7=` gives 21, `3*7=21+5=` gives 26: the value of what follows the last `;` or `=`. Without `=` the response ends."""
    if not episode.response.endswith("="):
        return None
    found = re.search(r"(?:^|[;=])(-?\d+)([-+*])(\d+)=$", episode.text)
    if found is None:
        return "?"
    left, right = int(found[1]), int(found[3])
    return str({"+": left + right, "-": left - right, "*": left * right}[found[2]])

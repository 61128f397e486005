"""A Python tool: the last fenced Python block of a turn is run in a sandbox, and the next message of the user has its output."""

from megatron_fipo.tasks.code.reward import last_python_block
from megatron_fipo.tasks.code.sandbox import Limits, Sandbox

LIMITS = Limits(cpu_s=5.0, wall_s=8.0, memory_mb=256, output_bytes=4096)
sandbox = Sandbox(modules=[])


def step(episode):
    """A response without a Python block ends, and the reward scores it."""
    source = last_python_block(episode.response)
    if source is None:
        return None
    run = sandbox.run(source, None, b"", LIMITS)
    output = (
        run.output.decode(errors="replace") if run.end == "finished" else f"the program ended with: {run.end}"
    )
    return [{"role": "user", "content": f"```output\n{output}\n```"}]

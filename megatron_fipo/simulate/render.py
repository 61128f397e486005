"""A simulated run in the terminal."""

from rich.console import Console
from rich.table import Table

from megatron_fipo.plan.render_cost import print_basis
from megatron_fipo.simulate.operation import Operation
from megatron_fipo.simulate.summary import accuracy, operation_rows, summary, time_by_cause
from megatron_fipo.simulate.training import Training


def print_training(training: Training, operation: Operation, console: Console) -> None:
    """Print the result, where the time goes, and what is assumed."""
    result = Table(title="Simulated run", show_header=False)
    for name, value in summary(training):
        result.add_row(name, value)
    console.print(result)
    causes = Table("time for", "time", "share", title="Where the time goes")
    for row in time_by_cause(training):
        causes.add_row(*row)
    console.print(causes)
    assumed = ", ".join(f"{name} {value}" for name, value in operation_rows(operation))
    console.print(f"{accuracy(training)} Assumed of the cluster: {assumed}.", highlight=False)
    print_basis(training.case, [], console)

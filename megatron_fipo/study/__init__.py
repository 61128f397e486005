"""Studies: arms trained over seeds by `megatron-fipo train`, one table of all runs, intervals, and a page.

schema.py          the settings of a study
grid.py            its runs, and what each one's settings are; checked before any starts
outcome.py         what became of a run that the study started
processes.py       the processes of the runs, some at a time
launch.py          a study from its lock to the last run
results.py         what a run's folder contains, as a row of the table
problems.py        accuracy and length of each held-out problem
statistics.py      means, paired differences and their intervals; numpy alone
compare.py         which runs form an arm, and which arms are compared
table.py           the results as CSV, JSON and Markdown
curves.py, page.py the page
"""

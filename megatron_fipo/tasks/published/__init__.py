"""Published data sets of mathematics problems, as the rows that training and evaluation read: `megatron-fipo data`."""

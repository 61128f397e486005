"""Countdown by search in the open: a task on which two CPU cores can show that RL makes the reasoning longer.

A problem is three or four numbers (1-9) and a target (1-99): combine the numbers, in the order given, with + - *,
strictly left to right, so `3+7*5` is (3+7)*5 = 50. The prompt is `3,7,5=26:`. A response makes attempts such
as `3*7=21+5=26-26=0;`: each evaluates an expression and subtracts the target, so 0 means solved. It ends with
`#` and the chosen expression. The base model is trained on traces that often give up early, so RL can change
the response length by reward alone.
"""

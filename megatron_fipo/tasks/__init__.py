"""What a run trains on: problems and their rewards.

    task.py             Problem and Score, and the two functions that make a task: DataSource and RewardFunction
    registry.py         data sources and rewards by the names that the configuration uses
    dataset.py          the order in which training takes its problems
    prompt_encoder.py   a prompt to text and token ids
    prompt_file.py      the data sources `parquet` and `jsonl`
    row_reader.py       their files as a stream of rows
    row.py              one row as a prompt with its answer
    strict_json.py      JSON that refuses a key twice
    dapo_math.py        the reward function `dapo_math`
    countdown/          the built-in demo task, complete: problems, traces, tokenizer, reward function

To add a task, write its reward function, and a data source if its problems are not read from a file, and add them to
`registry.py`.
"""

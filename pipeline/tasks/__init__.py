"""The seven tasks of the pipeline: `ingest`, `preprocess`, `search`, `train`, `evaluate`, `register`, `report`.

graph.py         the tasks, the order in which they follow from one another, and the settings that decide their outputs
steps.py         what each task does: a few lines that call the packages that do the work
search.py        the search task: what Ray Tune's search is given, and what is made of its trials
trial.py         trains one trial of the search
own_model.py     the tasks of a model of one's own instead of the Perceiver
new_process.py   calls a function in a process that has imported nothing yet
events.py        what a search reports while it runs
"""

"""Searches the model's shape and two training hyperparameters, with a training that the caller supplies.

config.py          settings of the search
space.py           dimensions of the search space and the models that it allows
proposals.py       the next point to try: Optuna's TPE, random or grid
search.py          the search with Ray Tune and ASHA
trial_queue.py     the trials in the order in which they run, and their record in the journal
asha.py            Ray Tune's ASHA, which does not judge an epoch of a resumed trial twice
trial_process.py   the Ray Tune actor that runs trials one after another
journal.py         the stored record of the trials, from which a search continues
resources.py       how many trials fit on a cluster at the same time
figures.py         the figures of a search as one HTML page
"""

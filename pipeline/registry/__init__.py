"""Keeps the models that runs have made as versions of one registered model, and decides which of them is the champion.

config.py             settings of the promotion
versions.py           versions and aliases in the MLflow registry, also when several pipelines register at once
promotion.py          the rules by which a version becomes the champion; does not use MLflow
tags.py               names of the tags of a version
evidence.py           what a version is judged by, as its tags and a file
register_trained.py   registers the model of a run, with its evidence and its card
export.py             writes a classifier as an MLflow model that loads without this project
model_card.py         text of the model card
fetch.py              finds and downloads a registered model by its URI
probabilities.py      checks that what a model gives are probabilities of its classes
"""

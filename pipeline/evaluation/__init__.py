"""Judges a trained model on held-out rows: accuracy, calibration, robustness, speed, and where it is wrong.

config.py        settings of the evaluation
evaluate.py      `evaluate`, the whole evaluation of one model
metrics.py       metrics of logits; the classes and rows that a report shows
calibration.py   expected calibration error and temperature scaling
corruptions.py   corrupted copies of images in five severities
predictions.py   the logits of a split as a Parquet file
"""

"""Classifies any number of images with a registered model, in parts that are each done once.

config.py       options of a batch inference job
job.py          the job itself, over Ray Data
claim.py        the marks in the output by which it belongs to one job
classifier.py   the actor that classifies the images of a part and writes the results
"""

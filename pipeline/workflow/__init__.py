"""Durable tasks on Ray: a run that was cut off goes on where it was. Knows no machine learning.

task.py      what a task is, what it is given, and the errors that end it
run.py       the tasks of a run in storage: their keys, and which of them are done
runner.py    executes the tasks that are not done, and commits what they return
channel.py   carries events from the processes of a run to its driver, and a stop request back
lease.py     lets one driver at a time work at a run
address.py   finds the cluster to join, and asks whether it answers
cluster.py   joins the Ray cluster that is running, or starts one on this machine
nodes.py     checks that all nodes see the same storage, and have the same versions
"""

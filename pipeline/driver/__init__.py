"""All that runs in the process of the command: it plans a run, starts its tasks, shows and records their progress.

drive.py         what the command does, and its exit code
resources.py     whether the cluster has room for the workers and the trials
hang_up.py       lets the driver of a run on a cluster go on when its terminal is gone
progress.py      what a person sees while a run goes on
trial_table.py   the table of trials of a search
run_log.py       what is recorded of a run in MLflow
image_plan.py    what a dry run says of images of one's own
window.py        the check of the shuffle window before anything is started
summary.py       the table at the end, and the plan of a dry run
"""

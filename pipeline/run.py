"""Runs the pipeline: ingest, preprocess, search, train, evaluate, register, report.

    python pipeline/run.py quickstart     handwritten digits; a few minutes on 2 cores, test top-1 above 0.95
    python pipeline/run.py --help         lists all settings

If a run was interrupted, the same command continues it. Exit codes: 0 done; 1 a task failed, another driver took over
the run, or the tracking server has not received all records; 2 a setting or the data cannot be used; 128 + n stopped by
signal n, and can be continued.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this file's folder, and before what PYTHONPATH names: other programs have a `tune` or `pipeline` too.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[1])]

from pipeline.command import end, run_command
from pipeline.settings.command_line import parse


def run() -> int:
    preset, options = parse(sys.argv[1:])
    from pipeline.driver.drive import drive  # after parsing: --help and a bad value need no Ray

    return drive(preset, options)


def main() -> int:
    return run_command(run)


if __name__ == "__main__":
    end(main())

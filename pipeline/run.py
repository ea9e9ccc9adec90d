"""Runs the pipeline: ingest, preprocess, search, train, evaluate, register, report.

    python pipeline/run.py quickstart     handwritten digits, a few minutes on 2 cores, test top-1 above 0.95
    python pipeline/run.py --help         every setting

The same command again goes on where the last one was cut off. Exit codes: 0 done, 1 a task failed, 2 a setting or the
data cannot be used, 128 + n ended by signal n with a state to go on from.
"""

import sys

from pipeline.command_line import parse


def main() -> int:
    try:
        preset, options = parse(sys.argv[1:])
        from pipeline.driver import drive  # after parsing: --help and a bad value need no Ray

        return drive(preset, options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

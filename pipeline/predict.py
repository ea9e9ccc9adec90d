"""Classifies images with a registered model, over Ray Data with a pool of actors.

    python -m pipeline.predict models:/perceiver@champion IMAGES OUTPUT --tracking-uri sqlite:///runs/mlflow.db

IMAGES is a folder of images, Parquet (column `image`: uint8 tensors or encoded images) or an npz file (array `images`).
OUTPUT is a folder of Parquet files, one per part, with the columns `row_id`, `name` (path of the image, or null),
`class_name`, `class_index`, `probabilities` and `error`. An image that cannot be read has only an `error`; the job goes
on. After an interruption, the same command does the parts that are missing.

docs/evaluation.md has the measured speed. Exit codes: 0 done, 1 failed, 2 an argument cannot be used.
"""

import sys

import tyro

from pipeline.driver.progress import make_console
from pipeline.inference.job import PredictOptions, predict


def main() -> int:
    try:
        options = tyro.cli(PredictOptions, prog="python -m pipeline.predict", description=__doc__)
        console = make_console()
        summary = predict(options, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    console.print(f"{summary['rows']:,} images done, {summary['errors']} of them could not be read: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

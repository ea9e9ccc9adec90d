"""Classifies images with a registered model, over Ray Data with a pool of actors.

    python -m pipeline.predict models:/perceiver@champion IMAGES OUTPUT --tracking-uri sqlite:///runs/mlflow.db

IMAGES is a folder of images, Parquet (column `image`: uint8 tensors or encoded images) or an npz file (array `images`).
OUTPUT is a folder of Parquet files, one per part, with the columns `row_id`, `name` (path of the image, or null),
`class_name`, `class_index`, `probabilities` and `error`. An image that cannot be read has only an `error`; the job goes
on. After an interruption, the same command does the parts that are missing.

docs/evaluation.md has the measured speed. Exit codes: 0 done, 1 failed or no image could be read, 2 an
argument or the input cannot be used.
"""

import tyro
from rich.markup import escape

from pipeline.command import end, libraries_to_log, run_command, say_error
from pipeline.driver.progress import make_console
from pipeline.inference.config import PredictOptions
from pipeline.masking import mask


def run() -> int:
    options = tyro.cli(PredictOptions, prog="python -m pipeline.predict", description=__doc__)
    console = make_console()
    with libraries_to_log():
        from pipeline.inference.job import predict  # after parsing: --help and a bad value need no Ray

        summary = predict(options, console)
    done = f"{summary['rows']:,} images done, {summary['errors']} of them could not be read: {options.output}"
    console.print(escape(mask(done)))
    if summary["devices"]:
        console.print(escape(f"classified on {', '.join(summary['devices'])}"))
    if summary["rows"] == summary["errors"]:
        say_error("error: none of the images could be classified; the column `error` of the results says why")
        return 1
    return 0


def main() -> int:
    return run_command(run)


if __name__ == "__main__":
    end(main())

"""scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, embedded in the package."""

import numpy as np

from pipeline.data.config import DatasetConfig
from pipeline.data.rows import RawDataset, Rows
from pipeline.data.source import Source, verify_split


def _load(config: DatasetConfig, source: Source) -> RawDataset:
    """Scales the grey levels, 0 to 16, to the whole range of uint8, and takes out the test rows."""
    import sklearn.datasets
    import sklearn.model_selection

    digits = sklearn.datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    labels = digits.target.astype(np.int32)
    splits = sklearn.model_selection.train_test_split(
        np.arange(len(labels)), test_size=config.test_fraction, stratify=labels, random_state=config.seed
    )
    train, test = (Rows.of(images[np.sort(rows)], labels[np.sort(rows)]) for rows in splits)
    verify_split(train, source, None, "digits: train")
    verify_split(test, source, None, "digits: test")
    return RawDataset(train, test, label_names=[str(name) for name in digits.target_names])


DIGITS = Source(
    name="digits",
    description="Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998), as included in scikit-learn: "
    "1,797 images of 8 x 8. CC BY 4.0.",
    load=_load,
    image_shape=(8, 8, 1),
    num_classes=10,
    num_coarse_classes=None,
    flips=False,
    train_rows=1797,
    test_rows=0,
)

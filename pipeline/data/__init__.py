"""From a source of images to verified rows in Parquet shards, and from the shards back to rows in memory.

config.py        `DatasetConfig`: the source and how its rows are divided
source.py        `Source`: what a data set promises, and the checks that its rows keep it
sources.py       the data sets that the pipeline knows
cifar.py         CIFAR-100 and CIFAR-10
digits.py        the digits of scikit-learn
archives.py      reads the pickles of an archive without executing them
download.py      downloads an archive or takes a local copy, and checks its SHA-256
ingest.py        writes the verified rows of a source to Parquet files
exchange.py      brings rows from these files to the shards
preprocess.py    validates, splits and shuffles the rows into shards with Ray Data
rows.py          `Rows`: labelled images in memory; stratified splits; digests of rows
shards.py        writes and reads the Parquet file of a shard
ray_rows.py      reads many shards with Ray Data
order.py         the order of the rows of an epoch, as a whole or through a window of shards
shard_reader.py  reads verified shards from storage, some before they are needed
shard_cache.py   shards on the disk of a host
streamed_rows.py the rows of a split that is read from its shards as a training goes on
sharded_rows.py  the rows of a split whose pixels stay in its shards, for evaluation
split.py         opens a split in memory or in its shards

Images of one's own:

file_tree.py         all files below a folder or a URI, and what was left out
labelled_images.py   which images there are, of which class and in which split; `SplitFiles`
image_containers.py  images in Parquet files, tars and npz files
parquet_files.py     columns of Parquet files, accepted by type, a few rows at a time
npz_files.py         arrays of npz files, headers first
bounded_tar.py       headers of tar files, no longer than they may be
excerpt.py           the beginning of what a file says, for messages
image_decoding.py    the decoder of training and of batch inference
image_survey.py      the headers of all images, and what could not be trained
collected_images.py  their places, splits and labels as they are found
image_progress.py    how far a task has come that works through all images
image_rows.py        the same rows in memory
image_ingest.py      the same rows as Parquet files, with Ray Data
ray_tensors.py       columns of tensors as Ray Data writes them
image_files.py       images for batch inference, in parts: folders, Parquet files, npz files
"""

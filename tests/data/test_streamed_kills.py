"""Reading workers are killed again and again; each time another number of them goes on."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from streamed_shards import write_shards
from streaming_process import SHAPE

from pipeline.data.shard_reader import ShardReader
from pipeline.data.streamed_rows import StreamedRows
from pipeline.storage import Storage

SIZE = 64
COUNTS = [40 + number % 5 for number in range(40)]
WINDOW = 16 * max(COUNTS) * int(np.prod(SHAPE))  # 8 lanes of 2 shards
HERE = Path(__file__).parent


class Workers:
    """`count` reading processes that share the global batches, from a step on."""

    def __init__(self, storage: Storage, shards: str, count: int, epoch: int, step: int) -> None:
        script = str(HERE / "streaming_process.py")
        command = [sys.executable, script, storage.root, shards, str(WINDOW), str(SIZE)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
        share = SIZE // count
        self.processes = [
            subprocess.Popen(
                [*command, *map(str, (rank * share, (rank + 1) * share, epoch, step))],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(count)
        ]

    def batch(self) -> list[list[str]]:
        """The lines of all workers for the next step."""
        return [process.stdout.readline().split() for process in self.processes if process.stdout]

    def kill(self) -> None:
        for process in self.processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.communicate()


# Each kill starts up to eight processes.
@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_workers_see_what_an_unbroken_one_does(kills: int, tmp_path: Path) -> None:
    storage, choice = Storage(str(tmp_path)), random.Random(kills)
    _, entries = write_shards(storage, COUNTS, SHAPE)
    data = StreamedRows(ShardReader(storage), entries, SHAPE, WINDOW)
    order = data.order(SIZE, 5)
    assert (order.lanes, order.depth) == (8, 2)
    unbroken = data.global_batches(SIZE, 5, slice(0, SIZE), epoch=0, step=0)
    (epoch, step), count, most = (0, 0), 1, 0
    for _ in range(kills):
        count = choice.choice([number for number in (1, 2, 4, 8) if number != count])
        workers = Workers(storage, json.dumps(entries), count, epoch, step)
        try:
            for number in range(choice.randint(1, 2 * order.steps)):
                lines = workers.batch()
                epoch, step, batch = next(unbroken)
                assert {(int(line[0]), int(line[1])) for line in lines} == {(epoch, step)}
                share = SIZE // count
                for rank, (_, _, digest, read, *ids) in enumerate(lines):
                    rows = batch.take(slice(rank * share, (rank + 1) * share))
                    np.testing.assert_array_equal(rows.row_ids, [int(word) for word in ids])
                    assert digest == hashlib.sha256(rows.row_ids.tobytes() + rows.images.tobytes()).hexdigest()
                    if number == 0:
                        # The shards of the window, one ahead a lane, and the one that is being read.
                        lanes = order.lanes // count
                        assert int(read) <= lanes * (order.depth + 1) + 1
                        most = max(most, int(read))
        finally:
            workers.kill()
        epoch, step = (epoch, step + 1) if step + 1 < order.steps else (epoch + 1, 0)
    print(f"{kills} kills, {epoch} epochs; a resumed worker had read at most {most} shards at its first batch")

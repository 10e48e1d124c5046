"""What each worker does in tests/test_many_devices.py, all of it in one group, since to start one takes a while.

    msrun --worker_num=2 --local_worker_num=2 ... tests/many_devices.py FOLDER --csv_path ... --video_folder ...

Under FOLDER, besides the runs: <run>/rank_<r>.npz, the gradients of every update and the parameters at its end, and
rank_<r>.json, what the workers said to each other.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
from training_runs import SHORT

from mg import runtime
from mg.config import parse_config
from mg.data.errors import DataError
from mg.data.index import read_index
from mg.data.loader import ClipLoader, DataConfig
from mg.training import trainer
from mg.training.autoencoder import TrainConfig
from mg.training.step import TrainStep
from mg.training.updater import Updater
from mg.training.workers import WorkersError, require_same, share_bad_files

ADVERSARY = (
    "--discriminator.ndf=4 --discriminator.n_layers=1 --optim_discriminator.lr=1e-3 --optim.lr=1e-3 "
    "--optim.ema_decay=0.9 --data.image_ratio=0"
).split()
PROOFS = {  # by mode; in graph mode little, since it is compiled
    "graph": [*ADVERSARY, "--max_steps=3"],
    "pynative": [*ADVERSARY, "--max_steps=3", "--discriminator.n_layers=2", "--data.image_ratio=0.4"],
}
RESUMED = [
    *ADVERSARY,
    "--data.image_ratio=0.4",
    "--mode=pynative",
    "--ckpt_save_steps=2",
    "--data.flip=true",
    "--optim.loss_scale=dynamic",
    "--optim.init_loss_scale=64",
]
SHARDED = ["--plugin=zero2"]
BUCKETS = ["--mode=pynative", "--ckpt_save_steps=2", '--data.buckets={"16px": {8: [[1.0, 0.5], 1], 4: [1.0, 1]}}']


class Stop(Exception):
    """A run is to end here, as if it were killed."""


def record(output: Path, options: list[str], stop_after: int | None = None) -> None:
    """Train, and leave <output>/rank_<r>.npz; with `stop_after`, only that many updates are made."""
    update, accumulate = Updater.update, TrainStep.accumulate
    gradients, steps = [], []

    def recorded(self, finite):
        reduce = self._reduce

        def reduced():
            norm = reduce()
            gradients.append(list(self.gathered().values()))
            return norm

        self._reduce = reduced
        try:
            return update(self, finite)
        finally:
            self._reduce = reduce

    def stopping(self, *args):
        steps.append(self)
        if self.done == stop_after:
            raise Stop
        accumulate(self, *args)

    Updater.update, TrainStep.accumulate = recorded, stopping
    try:
        trainer.train(parse_config(TrainConfig, "", [*SHORT, "--output_path", str(output), *options]))
    except Stop:
        pass
    finally:
        Updater.update, TrainStep.accumulate = update, accumulate
    step = steps[-1]
    networks = [*step.updater.parameters, *(step.discriminator.get_parameters() if step.discriminator else [])]
    values = {p.name: p.asnumpy() for p in networks} | step.state()
    values |= {f"gradient_{i}_{j}": g for i, each in enumerate(gradients) for j, g in enumerate(each)}
    np.savez(output / f"rank_{os.environ.get('RANK_ID', 0)}.npz", **values)


def main(folder: Path, data: list[str]) -> None:
    worker = runtime.setup("cpu")
    for mode, options in PROOFS.items():
        record(folder / mode, [*data, *options, f"--mode={mode}"])

    record(folder / "whole", [*data, *RESUMED, "--max_steps=4"])
    record(folder / "stopped", [*data, *RESUMED, "--max_steps=4"], stop_after=3)
    record(folder / "stopped", [*data, *RESUMED, "--max_steps=4", "--resume"])
    record(folder / "sharded", [*data, *RESUMED, *SHARDED, "--max_steps=4"])
    record(folder / "sharded_stopped", [*data, *RESUMED, *SHARDED, "--max_steps=4"], stop_after=3)
    record(folder / "sharded_stopped", [*data, *RESUMED, *SHARDED, "--max_steps=4", "--resume"])
    record(folder / "buckets", [*data, *BUCKETS, "--max_steps=4"])
    record(folder / "buckets_stopped", [*data, *BUCKETS, "--max_steps=4"], stop_after=3)
    record(folder / "buckets_stopped", [*data, *BUCKETS, "--max_steps=4", "--resume"])

    said = {"gathered": [content.decode() for content in worker.gather(b"ab"[: worker.rank + 1])]}
    said["nothing"] = worker.gather(b"") == [b""] * worker.world_size
    require_same(worker, {"options": [b"1"], "parameters": [b"2", b"3"]})
    try:
        require_same(worker, {"options": [b"1"], "parameters": [b"%d" % worker.rank]})
    except WorkersError as error:
        said["different"] = str(error)
    loader = ClipLoader(
        read_index(data[1], data[3]),
        DataConfig(sample_n_frames=4, image_size=16, crop_size=16, max_bad_share=0.2),
        0,
        worker.rank,
        worker.world_size,
    )
    known = set()
    for name in ("first", "second"):  # each of the workers finds another file, and the one of before again
        loader.bad_files[f"{name}_{worker.rank}"] = "it is bad"
        share_bad_files(worker, loader, known)
    said["bad_files"] = sorted(loader.bad_files)
    try:
        next(loader.batches())
    except DataError as error:
        said["stopped"] = str(error)[:30]
    (folder / f"rank_{worker.rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""The training loop of every model.

A run is a pure function of its config: the clip at index i of the global batch of step s, its noise and its dropout
depend only on (seed, s, i). So a killed run resumes from its newest checkpoint with exactly the losses it would have
had, and several workers make the same updates as one worker with their combined batch.

The model and its data come from the config's task, see `mg.training.task`.
"""

import json
import logging
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from mg import runtime
from mg.checkpoints import atomic_write
from mg.config import to_dict
from mg.plain_text import one_line, printable
from mg.settings import flattened
from mg.training.checkpoint import load_checkpoint, read_run, save_checkpoint
from mg.training.data_changes import describe_changes, note_rows
from mg.training.logs import RunLog
from mg.training.speed import SpeedMeter
from mg.training.step import StepResult
from mg.training.task import RunConfig, Task, TrainingError
from mg.training.updater import UpdateResult
from mg.training.wandb_run import WandbRun
from mg.training.workers import require_same, share_bad_files

_logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Progress of a run: updates done and, for each network, updates skipped in total and most recently in a row; also
    what its steps depend on: workers, clips per update (may differ for images; None with buckets) and total
    updates."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    disc_skipped: int = 0
    disc_skipped_in_a_row: int = 0
    workers: int | None = None
    clips: int | None = None
    total: int | None = None

    def count(self, result: StepResult) -> None:
        """Count one update."""
        self.step += 1
        self.skipped += not result.updated
        self.skipped_in_a_row = 0 if result.updated else self.skipped_in_a_row + 1
        if result.discriminator is not None:
            self.disc_skipped += not result.discriminator.updated
            self.disc_skipped_in_a_row = 0 if result.discriminator.updated else self.disc_skipped_in_a_row + 1


def train(config: RunConfig) -> Path | None:
    """Run the training that `config` describes; returns the final weights, `<model>.ckpt` in the output folder.

    With several workers, the first one writes all files and the others return None.

    Raises:
        ValueError: a config, file or data set is unusable for training, or the run diverged.
        OSError: a file cannot be written.
    """
    task, output = config.task(), Path(config.output_path)
    trackers = [WandbRun(output, to_dict(config), config.resume)] if config.wandb else []
    newest = task.find_checkpoint()
    rows = task.read_rows()
    noted = note_rows(rows)
    if newest:
        _compare_data(newest, noted, config, task.source)
    worker = runtime.setup(
        config.device, config.mode, config.seed, config.jit_level, deterministic=config.deterministic
    )

    task.build(rows, worker, newest)
    model, loader = task.model, task.loader
    per_update = config.optim.accumulation
    per_epoch = max(1, loader.steps_per_epoch // per_update)
    total = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
    save_every = config.ckpt_save_steps or config.ckpt_save_interval * per_epoch

    task.begin(total, newest is not None)
    step = task.step
    progress = _progress(load_checkpoint(newest, model, step)) if newest else Progress()
    per_step = per_update * task.worker.dp_size
    begun, progress.workers, progress.total = replace(progress), task.worker.dp_size, total
    progress.clips = loader.batch_size and per_step * loader.batch_size
    networks = [*model.get_parameters(), *(step.discriminator.get_parameters() if step.discriminator else [])]
    require_same(
        worker,
        {
            "options": [json.dumps(to_dict(config)).encode()],
            "CSV": [json.dumps(noted).encode()],
            "checkpoint to resume": [str(newest and newest.name).encode()],
            "parameters": (p.asnumpy().tobytes() for p in networks),
            "optimizer, EMA or loss scale": (value.tobytes() for value in step.state().values()),
        },
    )

    def is_saved() -> bool:
        return progress.step % save_every == 0 or progress.step == total

    meter = SpeedMeter(task.worker.dp_size)
    with closing(_updates(task, progress, meter)) as updates:
        if not worker.is_main:
            _validate(task, progress)
            for _ in updates:
                if is_saved():
                    step.state()  # a collective: the first worker needs this one's part
                _validate(task, progress)
            step.updater.averaged()
            return None
        _say_what_changes(begun, progress)
        _write_config(output / "config.json", config, progress.step)
        _logger.info(
            "%s: %.1fM trainable parameters, %d rows, updates %d to %d of %d x %s, %s mode on %s",
            model.name,
            sum(p.size for p in step.updater.parameters) / 1e6,
            len(rows),
            progress.step + 1,
            total,
            per_step,
            loader.batch_size or "a bucket's batch size",
            config.mode,
            worker.device,
        )
        if config.plugin is not None:
            held = sum(each.held() for each in (step.updater, step.discriminator_updater) if each)
            _logger.info("%s: gradients, averages and optimizer take %.1f MB on each worker", config.plugin, held / 1e6)
        with RunLog(output, progress.step, total, trackers) as log:
            _validate(task, progress, log)
            for result in updates:
                log.add(progress.step - 1, _scalars(result, progress), meter.scalars())
                if remark := task.remark(progress.step, result):
                    log.say(remark)
                if warning := meter.warning(config.data.num_workers):
                    log.say(warning, logging.WARNING)
                if is_saved():
                    log.save()
                    run = asdict(progress) | {"data": noted}
                    save_checkpoint(output / "checkpoints", model, step, run, config.ckpt_max_keep)
                    log.say(f"update {progress.step}: {meter.describe()}")
                    if picture := task.draw(progress.step):
                        log.add_image(progress.step - 1, "previews", picture)
                _validate(task, progress, log)
    for left_out, whose in ((progress.skipped, ""), (progress.disc_skipped, " of the discriminator")):
        if left_out:
            message = "%d of %d updates%s skipped: their loss or gradient was not finite"
            _logger.warning(message, left_out, total, whose)
    if loader.bad_files:
        first = printable(next(iter(loader.bad_files)))
        _logger.warning("%d files could not be used, e.g. %s", len(loader.bad_files), first)
    weights = output / f"{model.name}.ckpt"
    model.save_weights(weights, weights=step.updater.averaged())
    return weights


def _updates(task: Task, progress: Progress, meter: SpeedMeter) -> Generator[StepResult, None, None]:
    """Make the remaining updates, timed by `meter`; `progress` counts each one before its result is yielded."""
    config, loader, step = task.config, task.loader, task.step
    per_update, first = config.optim.accumulation, progress.step
    shapes: set[tuple] = set()
    shared: set[str] = set()
    with closing(loader.batches(progress.step * per_update)) as batches, runtime.CtrlC() as ctrl_c:
        while progress.step < progress.total:
            meter.begin()
            for batch in meter.timed(islice(batches, per_update)):
                inputs = task.prepare(batch)
                shape = inputs[0].shape
                if shape not in shapes:
                    shapes.add(shape)
                    at_cost = "; the step is compiled for it" if config.mode == "graph" else ""
                    _logger.info("update %d: the first batch of shape %s%s", progress.step + 1, shape, at_cost)
                step.accumulate(*inputs)
            result = step.update()
            meter.end()
            share_bad_files(task.worker, loader, shared)
            progress.count(result)
            ctrl_c.hold()
            yield result
            ctrl_c.check()
            for section, whose, left_out in (
                ("optim", "the", progress.skipped_in_a_row),
                ("optim_discriminator", "the discriminator's", progress.disc_skipped_in_a_row),
            ):
                if left_out and left_out >= getattr(config, section).max_skipped:
                    raise TrainingError(
                        f"{whose} loss or its gradient was not finite in {left_out} updates in a row, the last being "
                        f"number {progress.step}; lower --{section}.lr, or train in fp32 or bf16"
                    )
    _logger.info("shapes of batches: %d in %d updates", len(shapes), progress.total - first)


def _validate(task: Task, progress: Progress, log: RunLog | None = None) -> None:
    """Validate if it is due. This runs after the checkpoint, so a run resumed from it validates again."""
    with runtime.CtrlC() as ctrl_c:
        measured = task.validate(progress.step)
        ctrl_c.check()
    if measured is not None and log is not None:
        log.validate(progress.step, measured)


def _scalars(result: StepResult, progress: Progress) -> dict[str, float]:
    """The scalars logged for an update; the discriminator's only if it was updated."""

    def of(update: UpdateResult) -> dict[str, float]:
        return {"grad_norm": update.grad_norm, "lr": update.lr, "loss_scale": update.loss_scale}

    scalars = {"loss": result.loss, **result.terms, **of(result), "skipped": progress.skipped}
    if result.discriminator is not None:
        scalars |= {f"disc_{name}": value for name, value in of(result.discriminator).items()}
        scalars["disc_skipped"] = progress.disc_skipped
    return scalars


def _compare_data(checkpoint: Path, noted: list[list[str]], config: RunConfig, source: str) -> None:
    """Raise TrainingError if the rows are not those of the run, or only warn if `resume_changed_data` is set."""
    before = read_run(checkpoint).get("data")
    if before is None:
        _logger.warning(
            "%s does not say which data it was trained on (it is from an older version): the run continues without "
            "checking whether the rows of %s have changed since",
            checkpoint,
            source,
        )
        return
    changes = one_line(describe_changes(before, noted))
    if changes and not config.resume_changed_data:
        raise TrainingError(
            f"{source}: its rows are not those that {checkpoint} was trained on: {changes}. Restore the "
            "CSV, or pass --resume_changed_data to continue with these rows, which makes it a different run"
        )
    if changes:
        _logger.warning("resuming with different data than before: %s", changes)


def _progress(run: dict) -> Progress:
    return Progress(**{name: value for name, value in run.items() if name != "data"})


def _say_what_changes(before: Progress, now: Progress) -> None:
    """Warn if a resumed run will differ from the one that was started."""

    def changes(**values: str) -> list[str]:
        pairs = {words: (getattr(before, name), getattr(now, name)) for name, words in values.items()}
        return [f"{words} {old} -> {new}" for words, (old, new) in pairs.items() if old not in (None, new)]

    if changed := changes(workers="workers", clips="clips per update"):
        _logger.warning(
            "resuming with different batches than before, %s: the order of the rows changes from here on, so some may "
            "come twice in this epoch and others not at all. The learning rate still follows the number of the update; "
            "a decay ends with the last one.",
            ", ".join([*changed, *changes(total="total updates")]),
        )


def _write_config(path: Path, config: RunConfig, start: int) -> None:
    """Write the run's settings, and warn about those that differ from the ones it was started with."""
    settings = json.loads(json.dumps(to_dict(config)))
    if start and path.is_file():
        before, now = flattened(json.loads(path.read_text())), flattened(settings)
        changed = [key for key in now if not key.startswith("resume") and before.get(key) != now[key]]
        if changed:
            changes = ", ".join(f"{key} {before.get(key)} -> {now[key]}" for key in changed)
            _logger.warning("resuming with different settings than before: %s", changes)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n")

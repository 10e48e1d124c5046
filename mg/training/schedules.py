"""Learning rates of a run, one per update: a warm-up from 0, then `optim.schedule`."""

import math

from mg.training.optim import OptimizerConfig, import_mindcv


def learning_rates(config: OptimizerConfig, total_steps: int) -> list[float]:
    """The learning rate of every update, (total_steps,).

    Neither the first rate of a warm-up nor the last of a cosine, linear or polynomial decay is 0.
    """
    warmup = min(config.warmup_steps, total_steps)
    if config.schedule not in ("constant", "cosine_decay", "linear_decay", "polynomial_decay"):
        climb = [config.lr * step / warmup for step in range(1, warmup + 1)]
        return climb + [max(rate, config.min_lr) for rate in _mindcv_rates(config, warmup, total_steps)]
    power = config.schedule_options().get("power", 1.0)

    def rate(step: int) -> float:
        if step < warmup:
            return config.lr * step / warmup
        progress = (step - warmup) / (total_steps + 1 - warmup)  # below 1
        left = {
            "constant": 1.0,
            "cosine_decay": 0.5 * (1.0 + math.cos(math.pi * progress)),
            "linear_decay": 1.0 - progress,
            "polynomial_decay": (1.0 - progress) ** power,  # mindcv's has no min_lr
        }
        return config.min_lr + (config.lr - config.min_lr) * left[config.schedule]

    return [rate(step) for step in range(1, total_steps + 1)]


def _mindcv_rates(config: OptimizerConfig, warmup: int, total_steps: int) -> list[float]:
    """The rates after the warm-up, (total_steps - warmup,). A mindcv epoch is one update here, or the updates of one
    decay."""
    schedules = import_mindcv("scheduler.dynamic_lr", f"schedule {config.schedule}")
    options, after = config.schedule_options(), total_steps - warmup
    if config.schedule == "exponential_decay":
        steps = options["decay_steps"]
        epochs = math.ceil(after / steps)
        rates = schedules.exponential_refined_lr(
            options["decay_rate"], lr=config.lr, steps_per_epoch=steps, epochs=epochs
        )
        return rates[:after]
    if config.schedule == "step_decay":
        return schedules.step_lr(
            options["decay_steps"], options["decay_rate"], lr=config.lr, steps_per_epoch=1, epochs=after
        )
    if config.schedule == "multi_step_decay":
        rates = schedules.multi_step_lr(
            options["milestones"], options["decay_rate"], lr=config.lr, steps_per_epoch=1, epochs=total_steps
        )
        return rates[warmup:]
    if config.schedule == "cosine_restarts":
        length = max(1, after // options["num_cycles"])
        return schedules.cosine_decay_refined_lr(
            length, config.min_lr, eta_max=config.lr, steps_per_epoch=1, epochs=after, **options
        )
    if config.schedule == "one_cycle":
        first = config.lr / 25  # Smith's, arXiv:1708.07120
        rise = options["pct_start"]
        return schedules.one_cycle_lr(
            config.lr,
            pct_start=rise if rise * total_steps > 1 else 0.0,  # mindcv divides a rise of one update by zero
            div_factor=25,
            final_div_factor=first / config.min_lr if config.min_lr > 0 else math.inf,
            steps_per_epoch=1,
            epochs=total_steps,
        )
    return schedules.cyclic_lr(  # Smith's too, arXiv:1506.01186: triangles
        config.min_lr,
        config.lr,
        step_size_up=total_steps / options["num_cycles"] / 2,
        scale_fn=lambda cycle: options["cycle_decay"] ** (cycle - 1),
        steps_per_epoch=1,
        epochs=total_steps,
    )

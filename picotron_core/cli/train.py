"""`picotron train`: from settings to a trained model, one frozen value after the other."""

from __future__ import annotations

import logging
import math
import shlex
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from picotron_core.bounds import seconds_of
from picotron_core.checkpoint.commit import folder_of
from picotron_core.checkpoint.interval import Interval
from picotron_core.checkpoint.load import find_checkpoint, load_newest
from picotron_core.checkpoint.manifest import Facts
from picotron_core.checkpoint.save import Saver
from picotron_core.cli.console import View, open_view
from picotron_core.cli.generate import write_text, writer_of_run
from picotron_core.cli.job import Job, discard_new, prepare_job
from picotron_core.cli.log import RunLog, open_log
from picotron_core.cli.paths import recorded
from picotron_core.cli.resume import Finished, backends_of, device_name
from picotron_core.cli.stop import (
    INTERRUPTED,
    REQUEUE,
    SIGNALS,
    Stop,
    Stopped,
    listening,
)
from picotron_core.config import Settings
from picotron_core.engine.held_folder import HeldFolders, held_folders
from picotron_core.engine.metrics import StepRecord
from picotron_core.engine.metrics_file import Metrics, as_line
from picotron_core.engine.metrics_scan import read_curve, rewind_metrics
from picotron_core.engine.plot import plot_losses
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.engine.schedule import flags_to_go_on
from picotron_core.engine.train import train
from picotron_core.errors import (
    ConfigError,
    DamagedFileError,
    LostRankError,
    NotFiniteError,
    NotSavedError,
    PicotronError,
    RunError,
    is_out_of_memory,
)
from picotron_core.parallel.world import World, join
from picotron_core.registry.breadcrumb import breadcrumb
from picotron_core.registry.plugins import notify

SOON = 20  # steps after a load: a loss that is not finite then speaks against what was loaded
NOTHING_LOST = "before the first step, nothing to save yet. Start the same command again."
log = logging.getLogger("picotron")


def run_training(settings: Settings, *, resume: tuple[RunDirectory, Path] | None = None) -> int:
    """Train as the settings say; returns the exit code.

    Args:
        resume: what `find_run` returned, to go on with that run.

    Raises: Stopped where Ctrl-C came before the first step, was pressed twice, or came after the
        last save.
    """
    stop = Stop(limit_s=seconds_of(settings.config.run.time_limit))
    world = join(timeout_s=settings.config.run.timeout_s)
    with (
        open_log(quiet=not world.is_first) as run_log,
        listening(stop, say=run_log.say, ranks=world.size),
    ):
        try:
            job, code = _run(settings, resume, world, run_log, stop)
        except Finished as finished:
            run_log.say(str(finished))
            return 0
        except Stopped as stopped:
            if stopped.number != signal.SIGINT:
                run_log.say(f"{stopped} {NOTHING_LOST}")
                return stopped.exit_code
            raise
        except BaseException as error:
            run_log.note(f"error: {error}")
            raise
        stop.training = False
        if not world.is_first:
            return code
        with run_log.copying_stdout():
            try:
                _tell_end(settings, job, code, stop)
            except Stopped as stopped:  # everything is saved
                if stopped.number == signal.SIGINT:
                    raise
    return code


def _run(
    settings: Settings,
    resume: tuple[RunDirectory, Path] | None,
    world: World,
    run_log: RunLog,
    stop: Stop,
) -> tuple[Job, int]:
    """Prepare and train. Returns the exit code as well.

    Raises: Finished where there is nothing to do; Stopped as `run_training`, and for any signal
        that comes before training begins.
    """
    job: Job | None = None
    with open_view(settings.config, world, run_log) as view, ExitStack() as held:
        try:
            with _memory_errors_explained(settings):
                job = prepare_job(settings, resume, world, view, held)
                stop.training = True
                code = _train(job, view, stop)
            if code and not job.state.step:
                discard_new(job)
            world.leave()
        except Finished:
            world.leave()
            raise
        except BaseException as raised:
            error = raised if stop.training else _stopped_by(raised, stop, world)
            world.watchdog.fail(error)  # before anything that may wait for the others
            if job and world.size == 1:
                job.ops.comm.stop()
            if error is not raised:
                raise error from None
            raise
        job.ops.comm.stop()
    return job, code


def _stopped_by(error: BaseException, stop: Stop, world: World) -> BaseException:
    """`Stopped` for an error that follows from a rank's being stopped before the first step."""
    if not isinstance(error, LostRankError):
        return error
    for number in SIGNALS:
        if str(Stopped(number)) in world.watchdog.heard:
            return Stopped(number)
    if stop.asked:
        return Stopped(signal.SIGINT if stop.interrupted else signal.SIGTERM)
    return error


def _tell_end(settings: Settings, job: Job, code: int, stop: Stop) -> None:
    """Say how the run ended, and how to go on."""
    if code and not job.state.step:
        print(f"Stopped {NOTHING_LOST}")
    elif code:
        is_saved = folder_of(job.run.checkpoints, job.state.step).is_dir()
        how = "saved" if is_saved else "not saved: earlier checkpoints are untouched"
        print(f"Stopped at step {job.state.step}, {how}. Go on with:\n")
        print(f"  picotron train --resume {shlex.quote(str(job.run.path))}")
    else:
        _farewell(settings, job, sample="" if stop.asked else settings.config.run.sample)


def _train(job: Job, view: View, stop: Stop) -> int:
    """Train to the end; a run that fails right after a load goes back one checkpoint further.

    What is loaded was whole on disk, but may have been saved by a machine that computed nonsense.
    """
    saver, fallbacks = _saver(job), 0
    watched = (job.run.path, job.run.checkpoints) if job.world.is_first else ()
    with held_folders(*watched) as folders:
        while True:
            loaded = job.state.step
            try:
                return _loop(job, view, stop, saver, folders)
            except NotFiniteError as error:
                soon = loaded > 0 and job.state.step - loaded < SOON
                if not soon or fallbacks == job.config.checkpoint.max_fallbacks:
                    raise
                fallbacks += 1
                _go_back(job, saver, loaded, error)


def _go_back(job: Job, saver: Saver, loaded: int, error: NotFiniteError) -> None:
    """Load the checkpoint before the one that was loaded.

    Raises: `error` where there is none.
    """
    try:
        earlier = find_checkpoint(job.run.path, job.world, below=loaded)
    except (ConfigError, DamagedFileError):  # a lost rank is another matter
        raise error from None
    log.warning("%s It was loaded at step %d: going back to %s.", error, loaded, earlier.folder)
    job.state.weights.drop_gradients()
    loaded_now = load_newest(job.state, job.run.path, earlier, job.world)
    saver.saved = job.state.step
    saver.sound = {loaded_now.folder.name}
    if job.world.is_first:
        skips = loaded_now.manifest.skips
        rewind_metrics(job.run, job.state.step, skips=skips)


def _loop(job: Job, view: View, stop: Stop, saver: Saver, folders: HeldFolders) -> int:
    """Train to the end, or until someone asks to stop. Returns the exit code.

    Raises: RunError where the run's folder is gone; whatever is trained from then on would be lost.
    """
    records = train(
        job.state,
        config=job.config,
        tokens=job.tokens,
        ops=job.ops,
        world=job.world,
        flops_per_token=job.flops_per_token,
        peak_flops=job.peak_flops,
        span=job.span,
        # One rank alone cannot leave an evaluation that it shares with others.
        stopped=lambda: stop.asked and job.world.size == 1,
    )
    interval = Interval(job.config.checkpoint.every, saver)
    metrics = Metrics(job.run)
    if job.trace:
        records = job.trace.recorded(records, left=job.config.train.steps - job.state.step)
    with (
        breadcrumb(job.quarantine, job.used),
        _saved_if_not_finite(job, saver),
    ):
        # What was asked while this was prepared, or went back to an earlier checkpoint.
        interrupted, ended, _ = saver.move_on(stop.interrupted, stop.ended, False)
        for of_this_step in () if interrupted or ended else records:
            step = job.state.step
            step_s = next(r.step_s for r in of_this_step if isinstance(r, StepRecord))
            late = stop.is_late(step_s=step_s, save_s=saver.expected_s)
            due = interval.due(step, step_s) and job.world.is_first
            saved = saver.saved
            # All ranks must leave the loop at the same step, whichever was asked to.
            # Before anything else is written: of a save that failed it leaves nothing on the disk.
            interrupted, ended, due = saver.move_on(stop.interrupted, stop.ended or late, due)
            if not (interrupted or ended):  # which end with a save, and tries of its own
                saver.give_up()
            if job.world.is_first:
                for record in of_this_step:
                    metrics.append(record)
                    notify(job.registry, "picotron_on_step", record=as_line(record))
                    view.show(record)
            if saver.saved != saved and job.world.is_first:
                _tell(saver, interval)
            if interrupted or ended:
                break
            if due and step not in (saver.saved, job.config.train.steps):
                folders.refuse_lost()
                with job.span("save"):
                    begun = saver.start()
                if begun:
                    interval.began()
        folders.refuse_lost()
        try:
            _save(job, saver, left_s=stop.left_s)
            folders.refuse_lost()
        except NotSavedError as error:
            if not ((interrupted or ended) and saver.saved):
                raise
            if job.world.is_first:
                log.warning("%s The steps after %d are lost.", error, saver.saved)
    if job.trace:
        job.trace.finish()
    if job.state.step == job.config.train.steps:
        return 0
    return INTERRUPTED if interrupted else REQUEUE


def _tell(saver: Saver, interval: Interval) -> None:
    log.info(
        "saved step %d: %.1f MB in %.1f s, training waited %.2f s; at risk until the next: %s",
        *(saver.saved, saver.total_bytes / 1e6, saver.write_s, saver.waited_s, interval.at_risk()),
    )


def _saver(job: Job) -> Saver:
    config = job.config
    facts = Facts(
        data=job.tokens.key,
        eos_id=job.tokens.eos_id,
        seed=config.train.seed,
        global_batch=job.global_batch,
        seq_len=config.data.seq_len,
        config=recorded(config, job.run).model_dump(mode="json", exclude_none=True),
        backends=backends_of(job.selections),
        torch=job.device.torch,
        device=device_name(job.device),
        dtype=job.precision.compute,
        files=job.model.digests,
        ends=list(job.model.ends),
    )
    return Saver(
        job.state,
        job.run.checkpoints,
        facts=facts,
        keep=config.checkpoint.keep,
        max_mb_per_s=config.checkpoint.max_mb_per_s,
        max_misses=config.checkpoint.max_misses,
        saved=job.state.step,  # 0 is nothing to save
        sound=job.verified,
        world=job.world,
    )


@contextmanager
def _saved_if_not_finite(job: Job, saver: Saver) -> Iterator[None]:
    """The steps before one that float16 cannot make are not lost.

    In wider dtypes a loss that is not finite means that the weights are ruined: not worth keeping.
    What was being saved before is.
    """
    try:
        yield
    except NotFiniteError:
        if job.state.loss_scale and job.state.step:
            _save(job, saver)
        else:
            saver.finish()
        raise


def _save(job: Job, saver: Saver, *, left_s: float = math.inf) -> None:
    """Save, and wait for it."""
    patience_s = job.world.timeout_s
    job.world.watchdog.enter(f"the save of step {job.state.step}", patience_s=patience_s)
    before = saver.saved
    saver.save(left_s=left_s)
    if saver.saved != before:
        _draw(job)


def _draw(job: Job) -> None:
    if not job.world.is_first:
        return
    name = job.run.path.name
    try:
        plot_losses({name: read_curve(job.run)}, job.run.plot, title=name)
    except (OSError, DamagedFileError) as error:  # a picture is not worth a run
        log.warning("%s cannot be drawn: %s", job.run.plot, error)


@contextmanager
def _memory_errors_explained(settings: Settings) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"Out of memory. Lower --train.micro_batch (now {settings.config.train.micro_batch}; "
            "raise --train.accumulation to make up for it), --data.seq_len or the model: "
            "`picotron plan` with the same settings says what takes the memory, and what fits."
        ) from error


def _farewell(settings: Settings, job: Job, *, sample: str) -> None:
    """What the run wrote, and what to do with it."""
    run = job.run
    quoted = shlex.quote(str(run.path))
    if sample:
        print(f"\nA sample, continuing {sample!r}:\n")
        try:
            writer = writer_of_run(settings, run, find_checkpoint(run.path))
            write_text(settings, writer, prompt=sample)
        except PicotronError as error:  # the run itself is done and saved
            print(f"No sample: {error}")
    if run.plot.exists():
        print(f"\nThe losses as a picture: {run.plot}")
    else:
        print("\nFor a picture of the losses: pip install 'picotron[plot]'")
    print("\nNext:")
    further = flags_to_go_on(settings.config.train)
    for command in (
        f"picotron generate {quoted} --prompt 'def main('",
        *([f"picotron train --resume {quoted} {further}"] if further else []),
        "picotron train --data YOUR_TEXT_FILES",
        "PICOTRON_BACKENDS=naive-math picotron train",
        "picotron backends",
    ):
        print(f"  {command}")

"""What a run prints: a live bar on a terminal, plain lines in a pipe and in the run's log, nothing
on other ranks.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from picotron_core import __version__
from picotron_core.cli.log import MESSAGE, RunLog
from picotron_core.cli.selection import selection_table
from picotron_core.cli.terminal import open_console
from picotron_core.data.tokens import Tokens
from picotron_core.engine.metrics import EvalRecord, Record, StepRecord
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.hardware import Device, stand_in
from picotron_core.model.architecture import Architecture
from picotron_core.parallel.world import World
from picotron_core.precision import Precision
from picotron_core.registry import Selection
from picotron_core.schema import Config

PIPE_WIDTH = 120  # columns where no terminal says how many there are


@dataclass(slots=True)
class View:
    """Shows a run on one console, and in its log. On ranks other than the first both are quiet."""

    config: Config
    console: Console
    bar: Progress
    log: RunLog
    task: TaskID | None = None
    stages: dict[str, TaskID] = field(default_factory=dict)

    def print(self, *objects: object) -> None:
        """Print on the console, and in the log."""
        self.console.print(*objects)
        self.log.console.print(*objects)
        self.log.note_lost_streams()

    def introduce(self, device: Device, precision: Precision, world: World) -> None:
        ranks = f", {world.size} ranks" if world.size > 1 else ""
        self.print(f"[bold]picotron {__version__}[/] on {device}{ranks}")
        if device.simulated:
            real = stand_in(device, world.local_rank)
            self.print(
                f"[bold yellow]SIMULATED[/]: what {device.name} would choose, computed on {real}. "
                "Times and memory are not the card's."
            )
        self.print(f"dtype  {escape(str(precision))}")

    def progress(self, stage: str, done: int, total: int) -> None:
        """Data preparation, in bytes (total 0: unknown): a bar per stage, or one line in a pipe."""
        if stage not in self.stages:
            self.stages[stage] = self.bar.add_task(stage, count="", note="")
            size = f": {total / 1e6:.1f} MB" if total else ""
            self._line(f"data   {stage}{size}")
        size = f"{done / 1e6:.1f}/{total / 1e6:.1f} MB" if total else f"{done / 1e6:.1f} MB"
        self.bar.update(self.stages[stage], completed=done, total=total or None, count=size)

    def present(
        self,
        tokens: Tokens,
        architecture: Architecture,
        selections: Sequence[Selection],
        run: RunDirectory,
        rate: float,
    ) -> None:
        """All that was decided before the first step."""
        self.log.open(run)
        for stage in self.stages.values():
            self.bar.remove_task(stage)
        train = self.config.train
        print_ = self.print
        print_(f"data   {escape(tokens.label)}")
        print_(f"tokens {escape(tokens.tokenizer.policy)}")
        print_(
            f"model  Llama, {architecture.num_parameters / 1e6:.1f} M parameters, "
            f"{architecture.num_hidden_layers} layers of {architecture.hidden_size}"
        )
        per_step = train.micro_batch * train.accumulation
        print_(
            f"train  {train.steps} steps of {per_step} x {self.config.data.seq_len} tokens a rank"
        )
        print_(f"speed  matrix products at {rate / 1e9:.0f} GFLOP/s (MFU is relative to this)")
        print_(f"run    {escape(str(run.path))}\n")
        print_(selection_table(selections))
        print_()

    def show(self, record: Record) -> None:
        """A step or an evaluation."""
        if isinstance(record, EvalRecord):
            self.print(
                f"step {record.step:>6}  val_loss {record.val_loss:.4f}  "
                f"bits_per_byte {record.bits_per_byte:.4f}"
            )
            return
        total = self.config.train.steps
        if record.skipped:
            scale = f"the loss scale is {record.loss_scale:g} now"
            self.print(f"step {record.step + 1:>6}  overflowed, is tried again: {scale}")
            return
        if self.console.is_terminal:
            if self.task is None:
                self.task = self.bar.add_task("training", total=total, count="", note="")
            count = f"{record.step}/{total}"
            self.bar.update(self.task, completed=record.step, count=count, note=_note(record))
        if record.step % self.config.run.log_every == 0 or record.step in (1, total):
            left = (total - record.step) * record.step_s
            self._line(f"step {record.step:>6}  {_note(record)}  eta {_clock(left)}")

    def _line(self, text: str) -> None:
        """What a bar shows on a terminal."""
        if self.console.is_terminal:
            self.log.console.print(text)
        else:
            self.print(text)


def _note(record: StepRecord) -> str:
    mfu = "" if record.mfu is None else f"  mfu {record.mfu:.0%}"
    assert record.loss is not None  # it was not skipped
    assert record.grad_norm is not None
    return (
        f"loss {record.loss:.4f}  norm {record.grad_norm:.2f}  lr {record.lr:.2e}  "
        f"{record.tokens_per_s:,.0f} tokens/s{mfu}"
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


@contextmanager
def open_view(config: Config, world: World, run_log: RunLog | None = None) -> Iterator[View]:
    """A view while a run lasts; the messages of Python's `logging` go where it shows the run.

    Args:
        run_log: None for a run that leaves nothing behind.
    """
    run_log = run_log or RunLog(quiet=True)
    console = open_console(width=PIPE_WIDTH, quiet=not world.is_first)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    shown: logging.Handler
    if console.is_terminal:
        shown = RichHandler(console=console, show_time=False, show_path=False)
    else:
        shown = logging.StreamHandler(sys.stdout if world.is_first else sys.stderr)
        shown.setFormatter(logging.Formatter(MESSAGE))
    log = logging.getLogger("picotron")
    log.setLevel(logging.INFO)
    handlers = (shown, run_log.handler)
    for handler in handlers:
        log.addHandler(handler)
    try:
        with bar:
            yield View(config, console, bar, run_log)
    finally:
        for handler in handlers:
            log.removeHandler(handler)

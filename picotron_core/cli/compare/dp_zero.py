"""`picotron compare dp-zero`: plain replicas against ZeRO-1, on the same steps of one run.

Each way is a trial for memory, then two for time. Those go through the ways forwards and then
backwards: whoever shares the machine, and comes or goes meanwhile, slows all of them alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from picotron_core.cli.compare.trial import Bench, Noted, Trial, try_out
from picotron_core.cli.console import open_view
from picotron_core.cli.job import prepare_job
from picotron_core.config import Settings
from picotron_core.engine.memory import peak
from picotron_core.engine.peak import hold_no_freed_memory
from picotron_core.engine.run_directory import selection_record
from picotron_core.errors import ConfigError, RunError
from picotron_core.files import replace_text
from picotron_core.parallel.mesh import data_parallel_degree
from picotron_core.parallel.private_folder import private_folder
from picotron_core.parallel.world import World, join
from picotron_core.schema import Config

MEMORY_STEPS = 2  # the second begins where every later one does
LOSS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}  # relative: sums in another order


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One of the ways compared. reduce: what gradients travel in."""

    name: str
    zero: int
    reduce: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the ranks saw of a way: trials for memory of all of them, for time of the first.

    counted: what `picotron plan` foretells for the peak of a step.
    """

    way: Way
    counted: int
    ranks: list[Trial]
    timed: list[Trial]

    @property
    def losses(self) -> list[float | None]:
        return self.timed[0].losses

    @property
    def step_s(self) -> float:
        return median([s for trial in self.timed for s in trial.step_s])

    @property
    def sent(self) -> int:
        """Bytes a step, of the rank that sends most."""
        return max(sum(rank.sent.values()) for rank in self.ranks)

    def most(self, part: str) -> int | None:
        """Of the rank that has most; None where a rank cannot tell."""
        sizes = [getattr(rank, part) for rank in self.ranks]
        return None if None in sizes else max(sizes)


def compare_dp_zero(settings: Settings, *, steps: int, output: Path | None) -> int:
    """On each rank: train, and print on the first; exit code 1 where a check fails.

    Raises: ConfigError where there are no replicas among which to divide anything.
    """
    config, degrees = settings.config, settings.config.parallel
    world = join(timeout_s=config.run.timeout_s)
    replicas = data_parallel_degree(world.size, pp=degrees.pp, cp=degrees.cp, tp=degrees.tp)
    if replicas * degrees.cp == 1:
        raise ConfigError(
            "ZeRO-1 divides the optimizer among ranks with the same weights, but there is one. "
            "Start more ranks (--nproc), or lower --parallel.pp or --parallel.tp."
        )
    with open_view(config, world) as view, ExitStack() as stack:
        # Of all ranks where there is one: it is gone at their end even if they are killed.
        folder = world.folder or stack.enter_context(private_folder()).path
        try:
            noted = Noted()
            hold_no_freed_memory(True)  # nor what was freed before the first trial
            run = config.run.model_copy(update={"dir": str(folder / "runs"), "name": "compared"})
            aside = replace(settings, config=config.model_copy(update={"run": run}))
            job = prepare_job(aside, None, world, view, watch=noted.watch)
            bench = Bench.of(job, noted)
            backends = [selection_record(selection) for selection in job.selections]
            del job  # and with it its state
            found = _all_trials(bench, steps)
            world.leave()
        except BaseException as error:
            world.watchdog.fail(error)  # before anything that may wait for the others
            raise
        bench.ops.comm.stop()
        if not world.is_first:
            return 0
        verdicts = list(checks(found, dtype=bench.precision.compute, sharers=bench.mesh.data.size))
        view.console.print(_table(found, bench))
        for text, right in verdicts:
            view.console.print(f"{'[green]yes' if right else '[bold red]NO'}[/]  {text}")
        if output:
            answer = _answer(found, bench, verdicts) | {"backends": backends}
            replace_text(output, json.dumps(answer, indent=2) + "\n")
    return 0 if all(right for _, right in verdicts) else RunError.exit_code


def _ways(bench: Bench) -> list[Way]:
    reduce, compute = bench.precision.reduce, bench.precision.compute
    low = compute if compute != "float32" else "bfloat16"
    ways = [Way(name="replicas", zero=0, reduce=reduce), Way(name="ZeRO-1", zero=1, reduce=reduce)]
    if reduce == "float32":
        ways.append(Way(name=f"ZeRO-1, gradients in {low}", zero=1, reduce=low))
    return ways


def _all_trials(bench: Bench, steps: int) -> list[Found]:
    ways = _ways(bench)
    configs = [_config_of(way, bench.config) for way in ways]

    def trial(number: int, count: int, *, exactly: bool) -> Trial:
        return try_out(
            bench, configs[number], reduce=ways[number].reduce, steps=count, exactly=exactly
        )

    trial(0, 1, exactly=True)  # what is loaded and made once is in nobody's peak
    order = range(len(ways))
    memory = [trial(number, MEMORY_STEPS, exactly=True) for number in order]
    timed: list[list[Trial]] = [[] for _ in ways]
    for number in (*order, *reversed(order)):
        timed[number].append(trial(number, steps + 1, exactly=False))
    counted = [
        peak(replace(bench.work, parallel=config.parallel, reduce_dtype=way.reduce)).total
        for way, config in zip(ways, configs, strict=True)
    ]
    return [
        Found(way=way, counted=size, ranks=_of_all_ranks(bench.world, way.name, mine), timed=times)
        for way, size, mine, times in zip(ways, counted, memory, timed, strict=True)
    ]


def _config_of(way: Way, config: Config) -> Config:
    parallel = config.parallel.model_copy(update={"zero": way.zero})
    return config.model_copy(update={"parallel": parallel})


def _of_all_ranks(world: World, key: str, mine: Trial) -> list[Trial]:
    return [Trial(**json.loads(t)) for t in world.gather(f"trial/{key}", json.dumps(asdict(mine)))]


def checks(found: Sequence[Found], *, dtype: str, sharers: int) -> Iterator[tuple[str, bool]]:
    """What must hold, and whether it does.

    Args:
        found: the replicas first.
        dtype: computed in. sharers: ranks that divide the optimizer.
    """
    replicas, *others = found
    for other in others:
        exact = dtype if other.way.reduce == replicas.way.reduce else other.way.reduce
        apart = _apart(replicas.losses, other.losses)
        text = f"{other.way.name}: {len(other.losses)} losses equal those of replicas to"
        yield f"{text} {LOSS[exact]:g} relative (found {apart:.1e})", apart <= LOSS[exact]
        share = other.sent / replicas.sent
        half = dtype != "float32" and other.way.reduce != replicas.way.reduce == "float32"
        most = 0.55 if half else 1.0  # 2 + 2 bytes a parameter instead of 4 + 4
        text = f"{other.way.name}: sends at most {most:g} x what replicas do ({share:.3f} of it)"
        yield text, share <= most
        worst = max(
            rank.moments // 8 - math.ceil(rank.parameters / sharers) for rank in other.ranks
        )  # numbers above the even share: of padding, less than one a bucket
        buckets = sum(n for kind, n in other.ranks[0].collectives.items() if "scatter" in kind)
        text = f"{other.way.name}: no rank's optimizer has more than 1/{sharers}, rounded up"
        yield f"{text} for each of {buckets} buckets", worst <= buckets


def _apart(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float:
    """The largest relative difference; a step that overflowed must have done so in both."""
    if [loss is None for loss in ours] != [loss is None for loss in theirs]:
        return math.inf
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return max((abs(a - b) / abs(a) for a, b in pairs), default=0.0)


def _table(found: Sequence[Found], bench: Bench) -> Table:
    """A row for each thing, with its arithmetic: P parameters of a rank, N that share them."""
    first, N = found[0].ranks[0], bench.mesh.data.size
    table = Table(
        f"N = {N}, P = {first.parameters / 1e6:.1f} M, {bench.precision.compute}",
        *(text for one in found for text in (one.way.name, "")),
        box=None,
        header_style="bold",
    )
    for column in table.columns[1::2]:
        column.justify = "right"
    for title, cells in _rows(found, bench):
        table.add_row(title, *(text for cell in cells for text in cell))
    return table


def _rows(found: Sequence[Found], bench: Bench) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Title, and for each way the value and what it should be, or how it compares."""
    narrow = bench.precision.compute != "float32"
    size = 2 if narrow else 4
    replicas = found[0]
    for part, bytes_each in (("weights", size), ("masters", 4), ("moments", 8), ("gradients", 4)):
        if part == "masters" and not narrow:
            continue  # they are the weights
        cells = []
        for one in found:
            divided = " / N" if one.way.zero and part != "weights" else ""
            cells.append((_mib(one.most(part)), f"{bytes_each} P{divided}"))
        yield f"{part}, MiB", cells
    for kind in dict.fromkeys(kind for one in found for kind in one.ranks[0].sent):
        cells = []
        for one in found:
            counts = one.ranks[0].collectives.get(kind, 0)
            sizes = [rank.sent.get(kind, 0) for rank in one.ranks]
            cells.append((_mib(max(sizes)), f"in {counts}") if counts else ("", ""))
        yield f"{kind}, MiB sent", cells
    yield "all that is sent, MiB", [(_mib(o.sent), _ratio(o.sent, replicas.sent)) for o in found]
    for part, title in (("start", "peak of the start"), ("most", "peak of a step")):
        base = replicas.most(part)
        yield f"{title}, MiB", [(_mib(o.most(part)), _ratio(o.most(part), base)) for o in found]
    yield (
        "as it is counted",
        [(_mib(o.counted), _ratio(o.counted, replicas.counted)) for o in found],
    )
    yield (
        "median step, s",
        [(f"{one.step_s:.3f}", _ratio(one.step_s, replicas.step_s)) for one in found],
    )
    yield "last loss", [("-" if o.losses[-1] is None else f"{o.losses[-1]:.6f}", "") for o in found]


def _mib(size: int | None) -> str:
    return "not known" if size is None else f"{size / 2**20:.1f}"


def _ratio(size: float | None, base: float | None) -> str:
    return "" if size is None or base is None else f"{size / base:.2f} x"


def _answer(
    found: Sequence[Found], bench: Bench, verdicts: Sequence[tuple[str, bool]]
) -> dict[str, Any]:
    return {
        "ranks": bench.world.size,
        "replicas": bench.mesh.data.size,
        "dtype": bench.precision.compute,
        "settings": bench.config.model_dump(mode="json", exclude={"run"}),
        "ways": [
            {"name": one.way.name, "sent": one.sent, "step_s": one.step_s, **asdict(one)}
            for one in found
        ],
        "checks": [{"text": text, "holds": right} for text, right in verdicts],
    }

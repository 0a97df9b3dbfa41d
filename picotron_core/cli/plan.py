"""`picotron plan`: will this run fit, what takes the memory, and how long is a step?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from picotron_core.cli.model import draft_of, replicas_of
from picotron_core.cli.selection import (
    find_device,
    open_quarantine,
    open_registry,
    select,
    training_requests,
)
from picotron_core.cli.terminal import open_console
from picotron_core.config import Settings
from picotron_core.engine import memory, remedy, speed
from picotron_core.engine.kernel_memory import COUNTED, DIVIDED, Work, cost, counted_as
from picotron_core.engine.metrics import matrix_product_rate
from picotron_core.errors import ConfigError
from picotron_core.hardware import Device
from picotron_core.model.architecture import Architecture
from picotron_core.parallel.tensor import slice_of
from picotron_core.precision import Precision, choose_precision
from picotron_core.registry import Request, Selection, normalise
from picotron_core.registry.plugins import Registry
from picotron_core.registry.select import installed_version, judge
from picotron_core.registry.types import Candidate
from picotron_core.schema import Config

PIPE_WIDTH = 160  # columns where no terminal says how many there are
HOPELESS = 1.5  # of the memory: more than the estimate errs, and more than swap makes bearable
BARELY = 0.9  # of the memory: the estimate itself is only good to some per cent


def plan(settings: Settings, *, nproc: int, as_json: bool) -> int:
    """Print what the run takes on one rank; exit code 2 where that is more than the device has.

    Loads no data and no tokenizer: the vocabulary is the config's.
    """
    registry = open_registry(settings, open_quarantine(settings))
    device = find_device(settings, registry)
    config, train = settings.config, settings.config.train
    precision = choose_precision(train.dtype, [device], reduce=train.reduce_dtype)
    whole = draft_of(config)
    nproc = nproc or config.parallel.pp * config.parallel.cp * config.parallel.tp
    replicas = replicas_of(config, whole, nproc)
    wanted = training_requests(settings, whole, device, precision.compute, nproc)
    selections = select(settings, registry, wanted)
    work = work_of(config, whole, device, precision, replicas, selections)
    fits = memory.fits(work) if device.memory_bytes else None
    answer = _answer(work, whole, selections) | {"ranks": nproc}
    answer |= {
        "dtype_reason": precision.reason,
        "fits": fits,
        "notes": list(_notes(settings, work, selections)),
        "remedies": [],
    }
    if fits is False:
        found = remedy.remedies(work, _lean_ops(work, registry, wanted))
        answer["remedies"] = [asdict(way) for way in found]
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        _print(answer, work)
    return ConfigError.exit_code if fits is False else 0


def work_of(
    config: Config,
    whole: Architecture,
    device: Device,
    precision: Precision,
    replicas: int,
    selections: Mapping[str, Selection],
) -> Work:
    """One rank's step, of whose memory the formulas speak."""
    parallel, train = config.parallel, config.train
    return Work(
        architecture=slice_of(whole, parallel.tp),
        device=device,
        dtype=precision.compute,
        seq_len=config.data.seq_len // parallel.cp,
        micro_batch=train.micro_batch,
        accumulation=train.accumulation,
        document_mask=config.data.document_mask,
        reduce_dtype=precision.reduce,
        replicas=replicas * parallel.cp,  # ranks with the same weights
        parallel=parallel,
        kernels={
            op: counted_as(op, selections[op].chosen) if op in selections else DIVIDED
            for op in COUNTED
        },
    )


def refuse_too_large(
    config: Config,
    whole: Architecture,
    device: Device,
    precision: Precision,
    replicas: int,
    selections: Mapping[str, Selection],
) -> None:
    """Refuse what no swap saves: Linux grants memory that it does not have, and ends the process
    by SIGKILL when it is used. CUDA refuses by itself.

    Raises: ConfigError.
    """
    if device.type != "cpu" or device.simulated or not device.memory_bytes:
        return
    needed = memory.peak(work_of(config, whole, device, precision, replicas, selections)).total
    if needed > HOPELESS * device.memory_bytes:
        raise ConfigError(
            f"Out of memory: a step takes {_bytes(needed)}, and this machine has "
            f"{_bytes(device.memory_bytes)}. Lower --train.micro_batch (now "
            f"{config.train.micro_batch}), --data.seq_len or the model: `picotron plan` with the "
            "same settings says what takes the memory, and what fits."
        )


def _answer(work: Work, whole: Architecture, selections: Mapping[str, Selection]) -> dict[str, Any]:
    worst = memory.peak(work)
    moments = [moment for moment in memory.timeline(work) if moment.stage == worst.stage]
    expected = _speed(work)
    return {
        "device": str(work.device),
        "memory_bytes": work.device.memory_bytes,
        "dtype": work.dtype,
        "parameters": whole.num_parameters,
        "vocab_size": whole.vocab_size,
        "micro_batch": work.micro_batch,
        "seq_len": work.seq_len,
        "accumulation": work.accumulation,
        "replicas": work.replicas,
        "shards": work.shards,
        "backends": {
            op: selections[op].chosen.qualified_name if op in selections else DIVIDED
            for op in COUNTED
        },
        "stage": worst.stage,
        "peak": {"moment": worst.name, **{part: getattr(worst, part) for part in memory.PARTS}},
        "most": {part: max(getattr(m, part) for m in moments) for part in memory.PARTS},
        "reserve": memory.reserve(work.device, worst),
        "needed": memory.needed(work),
        "largest_micro_batch": memory.largest_micro_batch(work),
        "flops_per_token": whole.flops_per_token(work.seq_len),
        "speed": asdict(expected) if expected else None,
    }


def _speed(work: Work) -> speed.Speed | None:
    """By what this device does now, if it is here; else by what is published of it."""
    if work.device.simulated:
        rate = speed.published_rate(work.device, work.dtype)
        return None if rate is None else speed.predict(work, rate, "published")
    try:
        rate = matrix_product_rate(getattr(torch, work.dtype), torch.device(work.device.type))
    except torch.OutOfMemoryError:  # another run has the card; the plan stands without a time
        return None
    return speed.predict(work, rate, "measured")


def _notes(settings: Settings, work: Work, selections: Mapping[str, Selection]) -> Sequence[str]:
    """What a reader must know of the estimate."""
    notes = []
    for op in (op for op in COUNTED if op in selections):
        chosen = selections[op].chosen
        if normalise(chosen.backend.name) != work.kernels[op] or not chosen.provider.bundled:
            counted = work.kernels[op].replace("naive_math", "naive-math")
            claim = "claims linear memory" if chosen.backend.memory else "claims nothing of memory"
            notes.append(
                f"{op}: {chosen.qualified_name} {claim}; counted like {counted}, its own memory "
                "is not known"
            )
    if settings.config.data.tokenizer and not settings.config.model.path:
        notes.append(
            f"the vocabulary of data.tokenizer is not looked at: counted as data.vocab_size = "
            f"{settings.config.data.vocab_size}"
        )
    return notes


def _lean_ops(work: Work, registry: Registry, wanted: Sequence[Request]) -> list[str]:
    """The ops that mem_efficient could serve here and does not."""

    def able(candidate: Candidate) -> bool:
        asked = [request for request in wanted if request.op == candidate.backend.op]
        return bool(asked) and not judge(candidate, asked, installed_version).reasons

    return [
        candidate.backend.op
        for candidate in registry.candidates
        if candidate.provider.bundled
        and normalise(candidate.backend.name) == "mem_efficient"
        and work.kernels[candidate.backend.op] != "mem_efficient"
        and able(candidate)
    ]


def _print(answer: dict[str, Any], work: Work) -> None:
    console = open_console(width=PIPE_WIDTH)
    of_all = f" of {answer['ranks']} ranks" if answer["ranks"] > 1 else ""
    console.print(f"Device: {work.device}. Compute dtype: {work.dtype}.", style="bold")
    console.print(
        f"{answer['parameters'] / 1e6:.1f} M parameters with a vocabulary of "
        f"{answer['vocab_size']}; {work.micro_batch} x {work.seq_len} tokens a forward, "
        f"{work.tokens * work.accumulation * work.replicas} an update{of_all}.\n"
    )
    unit, number = ("GiB", 2**30) if answer["needed"] >= 2**30 else ("MiB", 2**20)
    stages = len(work.stages)
    one = f"stage {answer['stage'] + 1} of {stages}" if stages > 1 else "one rank"
    table = Table(one, unit, "", box=None, header_style="bold")
    table.columns[1].justify = "right"
    for name, size, how in _rows(answer, work):
        table.add_row(name, f"{size / number:.2f}", escape(how))
    console.print(table)
    tried = "" if work.on_cpu else " on CPUs, untried on CUDA"
    console.print(f"\nThe sum is counted: within 5% of what real steps allocate{tried}.")
    console.print(escape(_time(answer)))
    for note in answer["notes"]:
        console.print(f"[yellow]note[/]: {escape(note)}.")
    style = {True: "bold green", False: "bold red", None: "bold"}[answer["fits"]]
    console.print(escape(_verdict(answer)), style=style)


def _rows(answer: dict[str, Any], work: Work) -> Iterator[tuple[str, int, str]]:
    """What is alive at the worst moment: name, bytes, and what it is."""
    peak, most = answer["peak"], answer["most"]
    shared = f", 1/{work.shards} of it" if work.shards > 1 else ""
    how = {
        "weights": work.dtype,
        "masters": f"float32, what is updated{shared}",
        "moments": f"float32, AdamW's two{shared}",
        "gradients": "float32",
        "activations": _of_layers(work, answer),
        "loss": f"{_name(answer['backends']['loss'])}, {work.tokens} tokens",
        "temporary": f"the worst moment is {peak['moment']}",
    }
    for part in memory.PARTS:
        if most[part]:
            other = peak[part] < 0.9 * most[part]
            later = f"; {_bytes(most[part])} at another moment" if other else ""
            yield part, peak[part], how[part] + later
    _, gaps = memory.RESERVE["cpu" if work.on_cpu else "cuda"]
    what = "the process" if work.on_cpu else "the device's context"
    yield "reserve", answer["reserve"], f"assumed: {what}, and {gaps:.0%} of what comes and goes"
    has = answer["memory_bytes"]
    yield "needed", answer["needed"], f"of {_bytes(has)}" if has else ""


def _time(answer: dict[str, Any]) -> str:
    if (expected := answer["speed"]) is None:
        return "How long a step takes cannot be said: no rate of matrix products is known."
    step_s = expected["step_s"]
    return (
        f"A step of perhaps {_seconds(step_s)}, "
        f"{expected['tokens_per_s']:.0f} tokens/s: "
        f"an assumed {expected['efficiency']:.0%} of the {expected['source']} "
        f"{expected['rate'] / 1e12:.3g} TFLOP/s in {answer['dtype']}."
    )


def _of_layers(work: Work, answer: Mapping[str, Any]) -> str:
    layers = work.stages[answer["stage"]].layers
    layer = 2 * cost("norm", work).kept + cost("swiglu", work).kept + cost("attention", work).kept
    served = ", ".join(
        f"{op} {_name(answer['backends'][op])}" for op in ("attention", "swiglu", "norm")
    )
    return f"{layers} layers of {_bytes(layer)}: {served}"


def _verdict(answer: dict[str, Any]) -> str:
    needed, has = answer["needed"], answer["memory_bytes"]
    sizes = f"{_bytes(needed)} of {_bytes(has)}"
    if answer["fits"] is None:
        return f"Needs {_bytes(needed)}; the device does not say how much it has."
    if answer["fits"]:
        how = "Fits" if needed <= BARELY * has else "Fits, barely"
        return (
            f"{how}: {sizes}. The largest micro-batch that does is {answer['largest_micro_batch']}."
        )
    ways = [f"{way['flags']} ({_bytes(way['needed'])})" for way in answer["remedies"]]
    if ways:
        fix = f"Use {', or '.join(ways)}."
    else:
        fixed = sum(answer["most"][part] for part in ("weights", "masters", "moments", "gradients"))
        fix = (
            f"Weights, gradients and optimizer alone take {_bytes(fixed)}, at any micro-batch: "
            "make the model smaller (--model.num_hidden_layers, --model.hidden_size)."
        )
    return f"Does not fit: {sizes}, {_bytes(needed - has)} too much. {fix}"


def _name(qualified_name: str) -> str:
    return qualified_name.removeprefix("picotron/")


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _seconds(time_s: float) -> str:
    if time_s < 1:
        return f"{time_s * 1e3:.2g} ms"
    return f"{time_s:.{0 if time_s >= 10 else 1}f} s"

"""In a child process: torch, its devices, every op in every dtype launched on each, their speed.

`python -m picotron_core.cli.doctor.examine TASK.json ANSWERS.jsonl`. A line is written before each
thing that may kill this process, and one after it: see child.py. Nothing is printed.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING

from picotron_core.cli.doctor.child import Record, key_of
from picotron_core.cli.doctor.facts import device_row, import_torch, torch_facts
from picotron_core.config import Rule, Settings
from picotron_core.errors import PicotronError
from picotron_core.files import open_append, write_all
from picotron_core.hardware import Device, find, look
from picotron_core.parallel import lifeline
from picotron_core.precision import choose_precision
from picotron_core.schema import Config

if TYPE_CHECKING:  # these import torch: doing that is part of the examination
    from picotron_core.model.architecture import Architecture
    from picotron_core.registry import Request, Selection
    from picotron_core.registry.plugins import Registry
    from picotron_core.registry.quarantine import Quarantine

DTYPES = ("float32", "float16", "bfloat16")


class Examiner:
    """Does the task, and says each thing before and after."""

    def __init__(self, task: Record, answers: Path) -> None:
        config = Config.model_validate(task["config"])
        rules = tuple(Rule(op, tuple(names), source) for op, names, source in task["rules"])
        if not task["plugins"]:
            enable = config.plugins.model_copy(update={"enable": []})
            config, rules = config.model_copy(update={"plugins": enable}), ()
        self.settings = Settings(config, rules)
        self.launches: bool = task["launch"]
        self.settled = frozenset(task["settled"])
        self.answers = answers

    def say(self, **record: object) -> None:
        with open_append(self.answers) as file:
            write_all(file, (json.dumps(record) + "\n").encode())

    def trouble(self, error: PicotronError) -> None:
        """Something that keeps these settings from training here."""
        self.say(done="trouble", text=str(error))

    def examine(self) -> None:
        """Everything; the last line says whether another child must go on."""
        self.say(done="end" if self._examine() else "again")

    def _examine(self) -> bool:
        """False where this process can launch no more."""
        self.say(begin="torch")
        if error := import_torch():
            self.say(done="torch", error=error)
            return True
        self.say(begin="cuda")  # the driver may kill too
        self.say(done="torch", **torch_facts(self.settings.config.run.device.lower() != "cpu"))
        from picotron_core.cli.selection import open_quarantine

        quarantine = open_quarantine(self.settings)
        registry = self._registry(quarantine)
        self.say(begin="model")
        architecture = self._architecture()
        self.say(done="model", parameters=architecture.num_parameters)
        if not self.launches:
            self._judge_profile(registry, architecture)
            return True
        self.say(begin="devices")
        places, chosen = self._devices(registry)
        compute = self._compute_dtype(places[chosen]) if chosen else ""
        rows = [device_row(place, device, place == chosen) for place, device in places.items()]
        self.say(done="devices", devices=rows, compute=compute)
        for row in rows:
            device = places[row["place"]]
            if row["refused"] or device.simulated:
                continue
            _make_current(row["place"])
            for dtype in DTYPES:
                needed = compute if row["chosen"] else ""
                launches = self._launch_all(
                    registry, quarantine, architecture, row["place"], device, dtype, needed
                )
                if not launches:
                    return False
            self._measure(row["place"])
        return True

    def _judge_profile(self, registry: Registry, architecture: Architecture) -> None:
        """Whether training would start on a card that is not here: its dtype and its backends."""
        from picotron_core.cli.selection import select, training_requests

        try:
            device = find(self.settings.config.run.device)
            if dtype := self._compute_dtype(device):
                asked = training_requests(self.settings, architecture, device, dtype, 1)
                select(self.settings, registry, asked)
        except PicotronError as error:
            self.trouble(error)

    def _registry(self, quarantine: Quarantine) -> Registry:
        from picotron_core.registry.plugins import load_registry
        from picotron_core.registry.select import plugins_named

        config, rules = self.settings.config, self.settings.rules

        def evidence_against(point: EntryPoint) -> str:
            self.say(begin="plugins", plugin=point.name)  # its trial may take half a minute
            return quarantine.plugin(point)

        self.say(begin="plugins")
        try:
            registry = load_registry(
                [*config.plugins.enable, *plugins_named(rules)], evidence_against=evidence_against
            )
        except PicotronError as error:
            self.trouble(error)
            self.settings = Settings(config, ())
            registry = load_registry()
        rows = [
            {
                "plugin": record.provider.plugin,
                "status": record.status,
                "error": record.error,
                "traceback": record.traceback,
            }
            for record in registry.plugins
        ]
        self.say(done="plugins", plugins=rows)
        return registry

    def _architecture(self) -> Architecture:
        """The model of the settings, or the default one if that cannot be had."""
        from picotron_core.cli.model import draft_of

        config = self.settings.config
        try:
            return draft_of(config)
        except PicotronError as error:
            self.trouble(error)
            self.settings = Settings(
                config.model_copy(update={"model": Config().model}), self.settings.rules
            )
            return draft_of(self.settings.config)

    def _devices(self, registry: Registry) -> tuple[dict[str, Device], str]:
        """The devices to examine by torch's names, and the one that training would take."""
        import torch

        from picotron_core.registry.plugins import described_device

        wish = self.settings.config.run.device.lower()
        places: dict[str, Device] = {}
        if wish != "cpu" and torch.cuda.is_available():
            places |= {f"cuda:{i}": look("cuda", i) for i in range(torch.cuda.device_count())}
        if wish != "cuda":
            places["cpu"] = look("cpu")
        chosen = next(iter(places), "")
        if wish == "auto" and (described := described_device(registry)):
            same = [place for place in places if place.partition(":")[0] == described.type]
            chosen = next(iter(same), described.type)
            places[chosen] = described
        return places, chosen

    def _compute_dtype(self, device: Device) -> str:
        """What training would compute in; "" where it would not start."""
        train = self.settings.config.train
        try:
            return choose_precision(train.dtype, [device], reduce=train.reduce_dtype).compute
        except PicotronError as error:
            self.trouble(error)
            return ""

    def _launch_all(
        self,
        registry: Registry,
        quarantine: Quarantine,
        architecture: Architecture,
        place: str,
        device: Device,
        dtype: str,
        compute: str,
    ) -> bool:
        """Every op and backend in one dtype; False where this process can launch no more."""
        from picotron_core.cli.doctor.launch import is_poisoned, launch
        from picotron_core.cli.selection import training_requests
        from picotron_core.registry.select import installed_version, judge, rank

        try:
            asked = training_requests(self.settings, architecture, device, dtype, 1)
        except PicotronError as error:
            if dtype == DTYPES[0]:
                self.trouble(error)
            return True
        for request in (request for request in asked if request.dtype == dtype):
            # Masters and gradients in flight are float32: these ops are needed in it, whatever the
            # model computes in.
            needed = bool(compute) and (dtype == compute or request.op in ("optimizer", "comm"))
            queue = self._queue(registry, request, needed)
            mine = [c for c in registry.candidates if c.backend.op == request.op]
            verdicts = sorted((judge(c, [request], installed_version) for c in mine), key=rank)
            for verdict in verdicts:
                name = verdict.candidate.qualified_name
                row = {
                    **{"place": place, "op": request.op, "backend": name, "dtype": dtype},
                    "turn": queue.index(name) if name in queue else None,
                    "needed": needed,
                }
                if key_of(row) in self.settled:
                    continue
                if verdict.reasons:
                    why = "; ".join(map(str, verdict.reasons))
                    self.say(done="launch", **row, status="refused", detail=why)
                    continue
                self.say(begin="launch", **row)
                # As in a run: a plugin's kernel is in this process only after a child survived it.
                if quarantined := quarantine.kernel(verdict.candidate, (request,)):
                    why = quarantined.detail
                    self.say(done="launch", **row, status="quarantined", detail=why)
                    continue
                wrong = launch(verdict.candidate, request, registry, place)
                status = "failed" if wrong else _quality(device, dtype)
                self.say(done="launch", **row, status=status, detail=wrong)
                if wrong and is_poisoned(place):
                    return False
        return True

    def _queue(self, registry: Registry, request: Request, needed: bool) -> list[str]:
        """Who would serve under the settings, and who after that."""
        from picotron_core.cli.selection import select

        try:
            selection: Selection = select(self.settings, registry, [request])[request.op]
        except PicotronError as error:
            if needed:
                self.trouble(error)
            return []
        return [c.qualified_name for c in (selection.chosen, *selection.runners_up)]

    def _measure(self, place: str) -> None:
        """Bytes per second of a large copy, FLOP/s of large products."""
        from picotron_core.cli.doctor.rates import copy_rate, product_rate

        for what in ("copy", *DTYPES):
            row = {"place": place, "dtype": what}
            if key_of(row) in self.settled:
                continue
            self.say(begin="rate", **row)
            rate, error = copy_rate(place) if what == "copy" else product_rate(what, place)
            self.say(done="rate", **row, per_s=rate, error=error)


def _make_current(place: str) -> None:
    import torch

    if place.startswith("cuda:"):
        torch.cuda.set_device(place)


def _quality(device: Device, dtype: str) -> str:
    """How a dtype that works does so: ok, emulated, or slow."""
    if device.type == "cpu" and dtype == "float16":
        return "slow"
    try:
        choose_precision(dtype, [device])
    except PicotronError:
        return "emulated" if dtype == "bfloat16" else "slow"
    return "ok"


if __name__ == "__main__":
    lifeline.attach()
    question, answers = map(Path, sys.argv[1:])
    Examiner(json.loads(question.read_text(encoding="utf-8")), answers).examine()

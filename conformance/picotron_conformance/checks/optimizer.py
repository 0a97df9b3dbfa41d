"""Is each update right, in place, and the same under another backend's state?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from picotron_conformance.cases.optimizer import PLAIN, Updates, cases, hyper
from picotron_conformance.check import (
    Check,
    Profile,
    Record,
    Target,
    UndecidedError,
    Verdict,
    WrongKernelError,
    hinted,
)
from picotron_conformance.checks.claims import ran_its_kernel, ran_no_other
from picotron_conformance.checks.optimizer_lists import leaks, reloaded, sizes
from picotron_conformance.checks.optimizer_nonfinite import not_finite
from picotron_conformance.judge import judge
from picotron_conformance.surroundings import put_back, snapshot
from picotron_conformance.updates import (
    DTYPES,
    golden,
    judge_lists,
    numbers_of,
    placed_lists,
    run,
)
from picotron_core.errors import PicotronError
from picotron_core.hardware import Device
from picotron_core.ops.optimizer import STATES
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.types import Request


def checks(device: Device, profile: Profile, seed: int) -> Iterator[Check]:
    request = Request(op="optimizer", device=device, dtype="float32")
    ask = partial(Check, op="optimizer", dtype="float32", request=request)
    for case in cases(profile, seed):
        yield ask(name="update", case=case.name, aspect="forward", run=partial(update, case=case))
    questions: dict[str, tuple[str, Callable[[Target, Record], None]]] = {
        "exact": ("exact", exact),
        "exchange": ("state", exchange),
        "other-step": ("state", other_step),
        "repeat": ("state", repeat),
        "globals": ("state", globals_unchanged),
        "arguments": ("state", arguments),
        "leaves": ("special", leaves),
        "nan": ("special", not_finite),
        "sizes": ("exact", sizes),
        "reloaded": ("state", reloaded),
        "leaks": ("state", leaks),
        "deterministic": ("claims", deterministic),
        "launches": ("claims", launches),
        "own-code": ("claims", own_code),
    }
    for name, (aspect, question) in questions.items():
        yield ask(name=name, case="", aspect=aspect, run=question)


def update(target: Target, record: Record, *, case: Updates) -> None:
    """The update, and both moments, of every parameter of the list."""
    lists, _ = run(target, case, target.seed)
    judge_lists(target, record, case, lists, target.seed)


def exact(target: Target, record: Record) -> None:
    """No gradient is pure decay; no rate changes no bit; one update of a lone 1 is known."""
    decay = Updates(name="decay", shapes=((33,),), steps=1, grads="zeros")
    lists, numbers = run(target, decay, target.seed)
    factor = 1 - PLAIN.lr * PLAIN.weight_decay
    found, wanted = lists.params[0].double().cpu(), numbers.params[0] * factor
    if not ((found - wanted).abs() <= 2.0**-22 * wanted.abs()).all():
        raise WrongKernelError("a gradient of zero must leave p (1 - lr * weight_decay)")
    for name in STATES:
        if lists.states[name][0].any():
            raise WrongKernelError(f"a gradient of zero must leave {name} at zero")
    still = Updates(name="still", shapes=((33,),), steps=2, hyper=hyper(lr=0.0))
    lists, numbers = run(target, still, target.seed)
    if not torch.equal(lists.params[0].double().cpu(), numbers.params[0]):
        raise WrongKernelError("lr = 0 must leave every bit of the parameter")


def exchange(target: Target, record: Record) -> None:
    """Every other update is made by another backend, on the same states."""
    case = Updates(name="exchange", steps=6)
    others = [
        candidate
        for candidate in load_registry().candidates
        if candidate.backend.op == "optimizer"
        and candidate.qualified_name != target.candidate.qualified_name
    ]
    asked = 0
    for other in others:
        request = Request(op="optimizer", device=target.hardware, dtype="float32")
        if other.backend.supports(request):
            continue
        try:
            kernel = other.backend.load()
        except (ImportError, PicotronError):
            continue  # it is not there to exchange with
        asked += 1
        lists, _ = run(target, case, target.seed, [target.kernel, kernel])
        with hinted(f"a state that means something else than that of {other.qualified_name}"):
            judge_lists(target, record, case, lists, target.seed)
    if not asked:
        raise UndecidedError(Verdict.UNSUPPORTED, "there is no other optimizer to exchange with")


def other_step(target: Target, record: Record) -> None:
    """The number of the update is the caller's: the same call at step 7, 2 and 7 again."""
    for step in (7, 2, 7):
        case = Updates(name=f"step-{step}", first_step=step, steps=1, state=True)
        lists, _ = run(target, case, target.seed)
        with hinted("a count of its own, or a bias correction that is kept"):
            judge_lists(target, record, case, lists, target.seed)


def repeat(target: Target, record: Record) -> None:
    """The same updates many times, on new memory and other numbers."""
    case = Updates(name="repeat")
    for seed in range(target.seed, target.seed + 12):
        lists, _ = run(target, case, seed)
        with hinted("a buffer of its own beside the states"):
            judge_lists(target, Record(), case, lists, seed)


def globals_unchanged(target: Target, record: Record) -> None:
    """Random states, flags, threads, and the functions of torch are as before."""
    if target.changes:
        raise WrongKernelError(f"loading the kernel changed {', '.join(target.changes)}")
    run(target, Updates(name="first"), target.seed)
    before = snapshot()
    run(target, Updates(name="second"), target.seed)
    if changed := put_back(before):
        raise WrongKernelError(f"a call changed {', '.join(changed)}")


def arguments(target: Target, record: Record) -> None:
    """The lists hold the same tensors in the same memory afterwards, and the states their names."""
    case = Updates(name="arguments", steps=1)
    numbers = numbers_of(case, target.seed)
    lists = placed_lists(target, case, numbers)
    params, states = lists.params, lists.states
    grads = [value.float().to(target.device) for value in numbers.grads[0]]
    held = {"params": params, "grads": grads, **states}
    before = {name: [(id(t), t.data_ptr()) for t in tensors] for name, tensors in held.items()}
    target.kernel(params, grads, states, step=1, hyper=case.hyper)
    if set(states) != set(STATES):
        raise WrongKernelError(f"states is now {sorted(states)}, must hold {sorted(STATES)}")
    for name, tensors in {"params": params, "grads": grads, **states}.items():
        if [(id(t), t.data_ptr()) for t in tensors] != before[name]:
            raise WrongKernelError(f"{name} holds other tensors, or other memory, than before")


def leaves(target: Target, record: Record) -> None:
    """Parameters are leaves that want a gradient; they stay so, without a graph."""
    case = Updates(name="leaves", steps=1)
    numbers = numbers_of(case, target.seed)
    params = [value.float().to(target.device).requires_grad_() for value in numbers.params]
    states = {n: [v.float().to(target.device) for v in kept] for n, kept in numbers.states.items()}
    grads = [value.float().to(target.device) for value in numbers.grads[0]]
    target.kernel(params, grads, states, step=1, hyper=case.hyper)
    for index, param in enumerate(params):
        if not (param.requires_grad and param.is_leaf):
            raise WrongKernelError(f"parameter {index} is no leaf that wants a gradient any more")
        found = {
            "update": (param.detach().double().cpu() - numbers.params[index]).float(),
            **{name: states[name][index] for name in STATES},
        }
        judge(found, golden(case, target.seed)[index], DTYPES, record)


def deterministic(target: Target, record: Record) -> None:
    """The same updates give the same bits."""
    if not target.candidate.backend.deterministic:
        raise UndecidedError(Verdict.UNSUPPORTED, "it does not claim to be deterministic")
    case = Updates(name="deterministic")
    first, _ = run(target, case, target.seed)
    again, _ = run(target, case, target.seed)
    for index in range(len(case.shapes)):
        for name, value in first.results(index).items():
            if not torch.equal(value, again.results(index)[name]):
                raise WrongKernelError(f"{name} of parameter {index} differs between two runs")


def launches(target: Target, record: Record) -> None:
    """An update shows one of the kernels that the backend says it launches."""
    ran_its_kernel(target, lambda: run(target, Updates(name="launches"), target.seed), "updates")


def own_code(target: Target, record: Record) -> None:
    """No update enters the code of another backend."""
    ran_no_other(target, lambda: run(target, Updates(name="own-code"), target.seed), "updates")

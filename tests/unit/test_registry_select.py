"""`resolve` is pure: devices, backends and wishes are made up here, no hardware is asked."""

import re

import pytest

from picotron_core.config import parse_backends
from picotron_core.errors import BackendError
from picotron_core.hardware import PROFILES
from picotron_core.registry import (
    Backend,
    Candidate,
    Code,
    Level,
    Provider,
    Reason,
    Request,
    kernel_from,
)
from picotron_core.registry.select import plugins_named, resolve

BUNDLED = Provider(plugin="picotron", distribution="picotron", version="1", bundled=True)
ACME = Provider(plugin="acme", distribution="acme-kernels", version="2.0")


def candidate(name, op="attention", level=Level.PORTABLE, provider=BUNDLED, needs=None, **fields):
    """A backend that serves all but what `needs` says: a device type it cannot do without."""

    def supports(request):
        if needs in (None, request.device.type):
            return ()
        detail = f"needs {needs}, device is {request.device.type}"
        return (Reason(code=Code.DEVICE, detail=detail, fix=f"Find a {needs} device"),)

    backend = Backend(
        op=op, name=name, level=level, load=kernel_from("os:sep"), supports=supports, **fields
    )
    return Candidate(backend=backend, provider=provider)


REFERENCE = candidate("naive-math", level=Level.REFERENCE)
SDPA = candidate("sdpa", level=Level.ACCELERATED)
EFFICIENT = candidate("mem_efficient")
CUDA_ONLY = candidate("warp", level=Level.SPECIALIZED, needs="cuda")
LOSS = candidate("naive-math", op="loss", level=Level.REFERENCE)
ALL = [REFERENCE, SDPA, EFFICIENT, CUDA_ONLY, LOSS]


def request(op="attention", device="cpu", **fields):
    return Request(op=op, device=PROFILES[device], dtype="float32", **fields)


def choose(wish="", *, requests=None, candidates=ALL, **fields):
    requests = [request()] if requests is None else requests
    rules = parse_backends(wish, "command line")
    return resolve(rules, requests, candidates, **fields)["attention"]


def test_auto_takes_the_highest_level_that_can():
    selection = choose()
    assert selection.chosen is SDPA
    assert selection.source == "auto"
    assert selection.runners_up == (EFFICIENT, REFERENCE)
    assert [verdict.candidate for verdict in selection.refused] == [CUDA_ONLY]
    assert choose(requests=[request(device="t4")]).chosen is CUDA_ONLY


def test_load_order_decides_nothing():
    assert choose(candidates=ALL[::-1]) == choose()


def test_ties_go_to_the_bundled_then_to_the_name():
    acme = candidate("a-first-by-name", provider=ACME)
    zeta = candidate("zeta")
    assert choose(candidates=[acme, zeta]).chosen is zeta
    assert choose(candidates=[zeta, EFFICIENT]).chosen is EFFICIENT


def test_one_name_is_strict():
    assert choose("attention=naive-math").chosen is REFERENCE
    assert choose("attention=naive-math").runners_up == ()
    with pytest.raises(BackendError) as error:
        choose("attention=warp")
    assert "needs cuda, device is cpu. Find a cuda device" in str(error.value)
    assert "--backends attention=auto" in str(error.value)


def test_a_list_falls_through_within_itself_only():
    assert choose("attention=warp,naive-math").chosen is REFERENCE
    assert choose("attention=warp,naive-math").runners_up == ()
    assert choose("attention=warp,auto").chosen is SDPA


def test_nobody_can_prints_every_reason():
    other = candidate("other", needs="mps")
    with pytest.raises(BackendError) as error:
        choose(candidates=[CUDA_ONLY, other])
    assert "picotron/warp: needs cuda" in str(error.value)
    assert "picotron/other: needs mps" in str(error.value)


@pytest.mark.parametrize("spelling", ["mem_efficient", "mem-efficient", "Mem-Efficient"])
def test_names_are_normalised(spelling):
    assert choose(f"attention={spelling}").chosen is EFFICIENT
    assert choose(f"attention=picotron/{spelling}").chosen is EFFICIENT


def test_a_bare_name_takes_every_op_that_it_has():
    rules = parse_backends("naive-math", "environment")
    chosen = resolve(rules, [request(), request("loss")], ALL)
    assert {selection.chosen for selection in chosen.values()} == {REFERENCE, LOSS}
    chosen = resolve(parse_backends("sdpa", "environment"), [request(), request("loss")], ALL)
    assert chosen["attention"].chosen is SDPA
    assert chosen["loss"].source == "auto"


def test_a_bare_auto_is_a_wish_too():
    rules = parse_backends("auto", "command line")
    rules += parse_backends("naive-math", "environment")
    selection = resolve(rules, [request()], ALL)["attention"]
    assert (selection.chosen, selection.source) == (SDPA, "command line")
    assert choose("warp,auto").chosen is SDPA
    assert choose("naive-math,auto").runners_up == (SDPA, EFFICIENT)


def test_within_a_source_the_ops_own_rule_beats_a_bare_name_beats_the_star():
    both = "attention=mem_efficient;naive-math"
    assert choose(both).chosen is EFFICIENT
    assert choose("naive-math;*=auto").chosen is REFERENCE


def test_a_stronger_source_beats_a_more_exact_weaker_one():
    rules = parse_backends("*=auto", "command line")
    rules += parse_backends("attention=naive-math", "environment")
    rules += parse_backends("attention=mem_efficient", "file")
    assert resolve(rules, [request()], ALL)["attention"].chosen is SDPA
    selection = resolve(rules[1:], [request()], ALL)["attention"]
    assert (selection.chosen, selection.source) == (REFERENCE, "environment")


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("atention=sdpa", "unknown op 'atention'. Did you mean 'attention'?"),
        ("attention=spda", "no backend 'spda' for op 'attention'. Did you mean 'sdpa'?"),
        ("loss=sdpa", "'sdpa' has: attention."),
        ("spda", "no backend 'spda'. Did you mean 'sdpa'?"),
        ("*=sdpa", "A bare sdpa takes it for just the ops that it has."),
        ("attention=acme/sdpa", "no backend 'acme/sdpa' for op 'attention'"),
    ],
)
def test_a_wrong_word_is_an_error_with_the_right_one(wish, message):
    with pytest.raises(BackendError, match=re.escape(message)):
        choose(wish)


def test_an_unknown_name_mentions_plugins_that_are_not_enabled():
    with pytest.raises(BackendError, match=r"not enabled: acme \(PICOTRON_PLUGINS=name\)"):
        choose("attention=flash", inactive=["acme"])


def test_a_backend_must_serve_every_request_of_its_op():
    picky = candidate("picky", level=Level.SPECIALIZED, needs="cpu")
    both = [request(), request(device="t4")]
    assert choose(requests=both, candidates=[picky, REFERENCE]).chosen is REFERENCE


def test_a_level_may_depend_on_the_request_and_the_lowest_counts():
    def level(request):
        return Level.REFERENCE if "window" in request.features else Level.SPECIALIZED

    moody = candidate("moody", level=level)
    assert choose(candidates=[moody, SDPA]).chosen is moody
    windowed = request(features=frozenset({"window"}))
    assert choose(requests=[request(), windowed], candidates=[moody, SDPA]).chosen is SDPA


def test_requirements_are_checked_without_an_import():
    needy = candidate("needy", level=Level.SPECIALIZED, requires=("acme-kernels>=2,<3",))
    versions = {"acme-kernels": "1.9"}
    selection = choose(candidates=[needy, SDPA], installed=versions.get)
    assert selection.chosen is SDPA
    reason = selection.refused[0].reasons[0]
    assert (reason.code, reason.detail) == (Code.VERSION, "needs acme-kernels>=2,<3, found 1.9")
    assert choose(candidates=[needy], installed={"acme-kernels": "2.1"}.get).chosen is needy
    absent = choose(candidates=[needy, SDPA], installed={}.get).refused[0].reasons[0]
    assert absent.code is Code.NOT_INSTALLED
    assert absent.fix == "pip install 'acme-kernels>=2,<3'"


def test_a_declaration_that_raises_rules_out_itself_alone():
    def explode(request):
        raise RuntimeError("boom")

    bad = Candidate(
        backend=Backend(
            op="attention", name="bad", level=Level.SPECIALIZED, load=explode, supports=explode
        ),
        provider=ACME,
    )
    selection = choose(candidates=[bad, SDPA])
    assert selection.chosen is SDPA
    assert selection.refused[0].reasons[0].code is Code.DECLARATION
    assert "RuntimeError: boom" in selection.refused[0].reasons[0].detail


def test_a_qualified_name_names_its_plugin():
    rules = parse_backends("attention=acme/flash,picotron/sdpa;other/x", "command line")
    assert plugins_named(rules) == ["acme", "other"]
    assert plugins_named(parse_backends("norm=Picotron/naive-math", "command line")) == []


@pytest.mark.parametrize("answer", ["needs cuda", ["needs cuda"]])
def test_a_supports_that_returns_no_reasons_rules_out_itself_alone(answer):
    backend = Backend(
        op="attention",
        name="bad",
        level=Level.SPECIALIZED,
        load=kernel_from("os:sep"),
        supports=lambda _: answer,
    )
    selection = choose(candidates=[Candidate(backend=backend, provider=ACME), SDPA])
    assert selection.chosen is SDPA
    assert "supports must return Reasons" in selection.refused[0].reasons[0].detail


def test_a_malformed_requirement_rules_out_itself_alone():
    needy = candidate("needy", level=Level.SPECIALIZED, requires=("two words",))
    selection = choose(candidates=[needy, SDPA])
    assert selection.chosen is SDPA
    assert selection.refused[0].reasons[0].code is Code.DECLARATION

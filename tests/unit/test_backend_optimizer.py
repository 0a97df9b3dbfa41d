"""AdamW: both backends against the oracle and torch's own, and their states exchanged."""

from importlib import import_module

import pytest
import torch
from picotron_conformance import oracles

from picotron_core.ops.optimizer import STATES, AdamW

BACKENDS = {
    name: import_module(f"picotron_backends.{module}.optimizer").adamw
    for name, module in (("naive-math", "naive_math"), ("torch-fused", "torch_fused"))
}
ALL = pytest.mark.parametrize("adamw", BACKENDS.values(), ids=BACKENDS)
SHAPES = ((), (1,), (7, 5), (0,), (33, 17), (1025,))
# A large step and decay, so that where each of them enters can be told from the result.
HYPER = AdamW(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-3, weight_decay=0.5)


def normal(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def zeros():
    return {name: [torch.zeros(shape) for shape in SHAPES] for name in STATES}


def arguments(hyper):
    return {name: getattr(hyper, name) for name in AdamW.__dataclass_fields__}


def run(kernels, steps=20, hyper=HYPER):
    """Parameters and states after `steps` updates, kernel t of `kernels` at update t."""
    params, states = normal(0), zeros()
    for step in range(1, steps + 1):
        kernels[step % len(kernels)](params, normal(step), states, step=step, hyper=hyper)
    return params, states


def close(found, wanted):
    torch.testing.assert_close([t.double() for t in found], list(wanted), rtol=1e-5, atol=1e-6)


def after_twenty_steps_of_the_oracle():
    columns = []
    for index, param in enumerate(normal(0)):
        values = (param, torch.zeros_like(param), torch.zeros_like(param))
        for step in range(1, 21):
            grad = normal(step)[index]
            values = oracles.adamw(values[0], grad, *values[1:], step=step, **arguments(HYPER))
        columns.append(values)
    return zip(*columns, strict=True)


@ALL
def test_twenty_steps_equal_the_oracle(adamw):
    params, states = run([adamw])
    for found, wanted in zip(
        (params, *(states[name] for name in STATES)),
        after_twenty_steps_of_the_oracle(),
        strict=True,
    ):
        close(found, wanted)


def test_a_state_goes_from_one_backend_to_the_other():
    params, states = run(list(BACKENDS.values()))
    for found, wanted in zip(
        (params, *(states[name] for name in STATES)),
        after_twenty_steps_of_the_oracle(),
        strict=True,
    ):
        close(found, wanted)


@ALL
def test_twenty_steps_equal_torch(adamw):
    params, _ = run([adamw])
    theirs = [torch.nn.Parameter(param.double()) for param in normal(0)]
    optimizer = torch.optim.AdamW(
        theirs,
        lr=HYPER.lr,
        betas=(HYPER.beta1, HYPER.beta2),
        eps=HYPER.eps,
        weight_decay=HYPER.weight_decay,
        foreach=False,
    )
    for step in range(1, 21):
        for param, grad in zip(theirs, normal(step), strict=True):
            param.grad = grad.double()
        optimizer.step()
    close(params, [param.detach() for param in theirs])


@ALL
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_one_update_late_in_a_run(adamw, step):
    """The bias correction is that of the step it is told, not of how often it was called."""
    params, grads, states = normal(0), normal(1), zeros()
    states["exp_avg"] = normal(2)
    states["exp_avg_sq"] = [tensor.square() for tensor in normal(3)]
    wanted = [
        oracles.adamw(*values, step=step, **arguments(HYPER))[0]
        for values in zip(params, grads, states["exp_avg"], states["exp_avg_sq"], strict=True)
    ]
    adamw(params, grads, states, step=step, hyper=HYPER)
    close(params, wanted)


@ALL
def test_works_in_place_on_leaves_and_leaves_gradients_alone(adamw):
    params = [tensor.requires_grad_() for tensor in normal(0)]
    grads, states = normal(1), zeros()
    places = [t.data_ptr() for t in (*params, *states["exp_avg"], *states["exp_avg_sq"])]
    adamw(params, grads, states, step=1, hyper=HYPER)
    assert places == [t.data_ptr() for t in (*params, *states["exp_avg"], *states["exp_avg_sq"])]
    assert all(map(torch.equal, grads, normal(1)))
    assert all(param.requires_grad and param.is_leaf for param in params)
    assert not torch.equal(params[2], normal(0)[2])


@ALL
def test_no_gradient_is_pure_decay_and_no_rate_is_no_change(adamw):
    params, states = normal(0), zeros()
    adamw(params, [torch.zeros(shape) for shape in SHAPES], states, step=1, hyper=HYPER)
    torch.testing.assert_close(params, [param * 0.95 for param in normal(0)])
    params = normal(0)
    still = AdamW(lr=0.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.5)
    adamw(params, normal(1), zeros(), step=1, hyper=still)
    assert all(map(torch.equal, params, normal(0)))


@ALL
@pytest.mark.parametrize("strided", ["param", "grad"])
def test_strides_that_differ(adamw, strided):
    """A transposed weight, or its transposed gradient: values belong together by index."""
    param, grad = normal(0, [(6, 4)])[0], normal(1, [(6, 4)])[0]
    wanted = oracles.adamw(
        param, grad, torch.zeros(6, 4), torch.zeros(6, 4), step=1, **arguments(HYPER)
    )
    if strided == "param":
        param = param.T.contiguous().T
    else:
        grad = grad.T.contiguous().T
    states = {name: [torch.zeros(6, 4)] for name in STATES}
    adamw([param], [grad], states, step=1, hyper=HYPER)
    close([param, states["exp_avg"][0], states["exp_avg_sq"][0]], wanted)


@ALL
def test_no_parameters_is_no_work(adamw):
    adamw([], [], {name: [] for name in STATES}, step=1, hyper=HYPER)

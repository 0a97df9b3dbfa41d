"""Wrong AdamWs. Each is the right one of `Update` with one thing wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from picotron_core.ops.optimizer import AdamW
from picotron_mutants.memory import as_if_dense, instance


class Update:
    """Right: one tensor after the other."""

    @torch.no_grad()
    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Mapping[str, Sequence[Tensor]],
        *,
        step: int,
        hyper: AdamW,
    ) -> None:
        for p, g, m, v in zip(params, grads, states["exp_avg"], states["exp_avg_sq"], strict=True):
            self.one(p, g, m, v, step, hyper)

    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        g = self.gradient(p, g, hyper)
        self.decay(p, hyper)
        self.first(m, g, hyper)
        self.second(v, g, hyper)
        self.move(p, self.direction(m, v, step, hyper), hyper)

    def gradient(self, p: Tensor, g: Tensor, hyper: AdamW) -> Tensor:
        return g

    def decay(self, p: Tensor, hyper: AdamW) -> None:
        p.mul_(1 - hyper.lr * hyper.weight_decay)

    def first(self, m: Tensor, g: Tensor, hyper: AdamW) -> None:
        m.mul_(hyper.beta1).add_(g, alpha=1 - hyper.beta1)

    def second(self, v: Tensor, g: Tensor, hyper: AdamW) -> None:
        v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)

    def corrections(self, step: int, hyper: AdamW) -> tuple[float, float]:
        return 1 - hyper.beta1**step, 1 - hyper.beta2**step

    def length(self, v: Tensor, correction: float, eps: float) -> Tensor:
        return (v / correction).sqrt() + eps

    def direction(self, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> Tensor:
        one, two = self.corrections(step, hyper)
        return m / one / self.length(v, two, hyper.eps)

    def move(self, p: Tensor, direction: Tensor, hyper: AdamW) -> None:
        p.sub_(hyper.lr * direction)


right = Update()


@instance
class l2_instead_of_decoupled(Update):
    def gradient(self, p: Tensor, g: Tensor, hyper: AdamW) -> Tensor:
        return g + hyper.weight_decay * p

    def decay(self, p: Tensor, hyper: AdamW) -> None:
        pass


class _DecayAfter(Update):
    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        super().one(p, g, m, v, step, replace(hyper, weight_decay=0.0))
        self.decay(p, hyper)


decay_after_update = _DecayAfter()


@instance
class decay_without_rate(Update):
    def decay(self, p: Tensor, hyper: AdamW) -> None:
        p.mul_(1 - hyper.weight_decay)


@instance
class decay_forgotten(Update):
    def decay(self, p: Tensor, hyper: AdamW) -> None:
        pass


@instance
class decay_as_exponential(Update):
    """exp(-lr wd) for 1 - lr wd: the same to first order."""

    def decay(self, p: Tensor, hyper: AdamW) -> None:
        p.mul_(math.exp(-hyper.lr * hyper.weight_decay))


@instance
class decay_of_matrices_alone(Update):
    """Vectors are norms and biases, some say."""

    def decay(self, p: Tensor, hyper: AdamW) -> None:
        if p.dim() > 1:
            super().decay(p, hyper)


@instance
class decay_only_with_gradient(Update):
    def decay(self, p: Tensor, hyper: AdamW) -> None:
        pass

    def gradient(self, p: Tensor, g: Tensor, hyper: AdamW) -> Tensor:
        if g.any():
            super().decay(p, hyper)
        return g


@instance
class step_from_zero(Update):
    def corrections(self, step: int, hyper: AdamW) -> tuple[float, float]:
        return super().corrections(max(1, step - 1), hyper)


@instance
class step_one_ahead(Update):
    def corrections(self, step: int, hyper: AdamW) -> tuple[float, float]:
        return super().corrections(step + 1, hyper)


@instance
class uncorrected(Update):
    def corrections(self, step: int, hyper: AdamW) -> tuple[float, float]:
        return 1.0, 1.0


@instance
class second_uncorrected(Update):
    def corrections(self, step: int, hyper: AdamW) -> tuple[float, float]:
        return super().corrections(step, hyper)[0], 1.0


@instance
class corrections_in_16_bits(Update):
    def corrections(self, step: int, hyper: AdamW) -> tuple[float, float]:
        one, two = super().corrections(step, hyper)
        return float(torch.tensor(one).bfloat16()), float(torch.tensor(two).bfloat16())


@instance
class corrections_of_float32_betas(Update):
    """beta in float32 to a large power: 1 - beta2^t of small t loses digits."""

    def corrections(self, step: int, hyper: AdamW) -> tuple[float, float]:
        one, two = torch.tensor([hyper.beta1, hyper.beta2], dtype=torch.float16) ** step
        return float(1 - one), float(1 - two)


@instance
class eps_in_root(Update):
    def length(self, v: Tensor, correction: float, eps: float) -> Tensor:
        return (v / correction + eps).sqrt()


@instance
class eps_squared_in_root(Update):
    def length(self, v: Tensor, correction: float, eps: float) -> Tensor:
        return (v / correction + eps * eps).sqrt()


@instance
class eps_before_correction(Update):
    """(sqrt(v) + eps) / sqrt(1 - beta2^t): eps grows in the first steps."""

    def length(self, v: Tensor, correction: float, eps: float) -> Tensor:
        return (v.sqrt() + eps) / math.sqrt(correction)


@instance
class eps_fixed(Update):
    def length(self, v: Tensor, correction: float, eps: float) -> Tensor:
        return super().length(v, correction, 1e-8)


@instance
class eps_dropped(Update):
    def length(self, v: Tensor, correction: float, eps: float) -> Tensor:
        return super().length(v, correction, 1e-30)


@instance
class root_forgotten(Update):
    def length(self, v: Tensor, correction: float, eps: float) -> Tensor:
        return v / correction + eps


@instance
class betas_swapped(Update):
    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        super().one(p, g, m, v, step, replace(hyper, beta1=hyper.beta2, beta2=hyper.beta1))


@instance
class betas_fixed(Update):
    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        super().one(p, g, m, v, step, replace(hyper, beta1=0.9, beta2=0.999))


@instance
class moments_not_weighted(Update):
    def first(self, m: Tensor, g: Tensor, hyper: AdamW) -> None:
        m.mul_(hyper.beta1).add_(g)


@instance
class second_of_first(Update):
    """v takes the square of m, not of g."""

    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        self.decay(p, hyper)
        self.first(m, g, hyper)
        self.second(v, m, hyper)
        self.move(p, self.direction(m, v, step, hyper), hyper)


@instance
class moves_by_old_moment(Update):
    """p moves before m and v take the gradient up."""

    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        self.decay(p, hyper)
        old = m.clone()
        self.first(m, g, hyper)
        self.second(v, g, hyper)
        self.move(p, self.direction(old, v, step, hyper), hyper)


@instance
class nesterov(Update):
    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        self.decay(p, hyper)
        self.first(m, g, hyper)
        self.second(v, g, hyper)
        ahead = hyper.beta1 * m + (1 - hyper.beta1) * g
        self.move(p, self.direction(ahead, v, step, hyper), hyper)


@instance
class amsgrad(Update):
    """v never shrinks."""

    def second(self, v: Tensor, g: Tensor, hyper: AdamW) -> None:
        before = v.clone()
        super().second(v, g, hyper)
        v.copy_(torch.maximum(v, before))


@instance
class gradient_clipped(Update):
    def gradient(self, p: Tensor, g: Tensor, hyper: AdamW) -> Tensor:
        return g.clamp(-10, 10)


@instance
class update_clipped(Update):
    def move(self, p: Tensor, direction: Tensor, hyper: AdamW) -> None:
        super().move(p, direction.clamp(-1, 1), hyper)


@instance
class maximizes(Update):
    def move(self, p: Tensor, direction: Tensor, hyper: AdamW) -> None:
        super().move(p, -direction, hyper)


@instance
class gradient_in_16_bits(Update):
    def gradient(self, p: Tensor, g: Tensor, hyper: AdamW) -> Tensor:
        return g.bfloat16().float()


@instance
class first_moment_in_16_bits(Update):
    def first(self, m: Tensor, g: Tensor, hyper: AdamW) -> None:
        super().first(m, g, hyper)
        m.copy_(m.bfloat16())


@instance
class second_moment_in_16_bits(Update):
    """Small changes of v are lost: it stops to decay."""

    def second(self, v: Tensor, g: Tensor, hyper: AdamW) -> None:
        super().second(v, g, hyper)
        v.copy_(v.bfloat16())


@instance
class parameter_in_16_bits(Update):
    def move(self, p: Tensor, direction: Tensor, hyper: AdamW) -> None:
        super().move(p, direction, hyper)
        p.copy_(p.bfloat16())


@instance
class update_in_16_bits(Update):
    def direction(self, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> Tensor:
        return super().direction(m, v, step, hyper).bfloat16().float()


@instance
class second_moment_by_float16(Update):
    """g^2 in float16: 0 for small gradients, infinite for large ones."""

    def second(self, v: Tensor, g: Tensor, hyper: AdamW) -> None:
        square = (g.half() * g.half()).float()
        v.mul_(hyper.beta2).add_(square, alpha=1 - hyper.beta2)


class _Lists(Update):
    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Mapping[str, Sequence[Tensor]],
        *,
        step: int,
        hyper: AdamW,
    ) -> None:
        self.lists(list(params), list(grads), {n: list(s) for n, s in states.items()}, step, hyper)

    def lists(self, params: Any, grads: Any, states: Any, step: int, hyper: AdamW) -> None:
        super().__call__(params, grads, states, step=step, hyper=hyper)


@instance
class first_parameter_alone(_Lists):
    def lists(self, params: Any, grads: Any, states: Any, step: int, hyper: AdamW) -> None:
        first = {name: kept[:1] for name, kept in states.items()}
        super().lists(params[:1], grads[:1], first, step, hyper)


@instance
class last_parameter_missed(_Lists):
    def lists(self, params: Any, grads: Any, states: Any, step: int, hyper: AdamW) -> None:
        count = max(1, len(params) - 1)
        kept = {name: kept[:count] for name, kept in states.items()}
        super().lists(params[:count], grads[:count], kept, step, hyper)


@instance
class no_parameters_fail(_Lists):
    def lists(self, params: Any, grads: Any, states: Any, step: int, hyper: AdamW) -> None:
        assert params[0].dtype == torch.float32
        super().lists(params, grads, states, step, hyper)


@instance
class empty_parameter_fails(Update):
    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        assert p.numel() > 0, "invalid grid: 0 blocks"
        super().one(p, g, m, v, step, hyper)


@instance
class lists_ended_by_empty_parameter(_Lists):
    def lists(self, params: Any, grads: Any, states: Any, step: int, hyper: AdamW) -> None:
        count = next((i for i, p in enumerate(params) if not p.numel()), len(params))
        kept = {name: kept[:count] for name, kept in states.items()}
        super().lists(params[:count], grads[:count], kept, step, hyper)


@instance
class states_zipped_in_reverse(_Lists):
    """Right for parameters of one shape only by luck."""

    def lists(self, params: Any, grads: Any, states: Any, step: int, hyper: AdamW) -> None:
        order = sorted(range(len(params)), key=lambda i: params[i].numel())
        same = [i for i in order if params[i].shape == params[order[0]].shape]
        swapped = dict(zip(same, reversed(same), strict=True))
        pick = [swapped.get(i, i) for i in range(len(params))]
        kept = {name: [kept[i] for i in pick] for name, kept in states.items()}
        super().lists(params, grads, kept, step, hyper)


@instance
class elements_beyond_1024_missed(Update):
    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        if p.is_contiguous() and all(x.is_contiguous() for x in (g, m, v)):
            p, g, m, v = (x.view(-1)[:1024] for x in (p, g, m, v))
        super().one(p, g, m, v, step, hyper)


@instance
class elements_tail_missed(Update):
    """Those after the last whole vector of four."""

    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        whole = p.numel() // 4 * 4
        if whole and all(x.is_contiguous() for x in (p, g, m, v)):
            p, g, m, v = (x.view(-1)[:whole] for x in (p, g, m, v))
        super().one(p, g, m, v, step, hyper)


@instance
class dense_parameter_assumed(Update):
    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        super().one(as_if_dense(p), g, m, v, step, hyper)


@instance
class dense_gradient_assumed(Update):
    def gradient(self, p: Tensor, g: Tensor, hyper: AdamW) -> Tensor:
        return as_if_dense(g)


@instance
class dense_states_assumed(Update):
    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        super().one(p, g, as_if_dense(m), as_if_dense(v), step, hyper)


@instance
class copy_of_strided_parameter_updated(Update):
    """`contiguous()` gives a copy, and nobody writes it back."""

    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        super().one(p.contiguous(), g, m.contiguous(), v.contiguous(), step, hyper)


@instance
class gradient_decayed_in_place(Update):
    def gradient(self, p: Tensor, g: Tensor, hyper: AdamW) -> Tensor:
        return g.mul_(1.0)


@instance
class gradient_cleared(Update):
    """zero_grad as a favour."""

    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        super().one(p, g, m, v, step, hyper)
        g.zero_()


@instance
class new_states_made(Update):
    """The states in the lists are replaced, not updated."""

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Mapping[str, Any],
        *,
        step: int,
        hyper: AdamW,
    ) -> None:
        for kept in states.values():
            if isinstance(kept, list):
                kept[:] = [x.clone() for x in kept]
        super().__call__(params, grads, states, step=step, hyper=hyper)


@instance
class parameter_moved_to_new_memory(Update):
    """p.data = ...: a fused buffer or a tied weight keeps the old memory."""

    def move(self, p: Tensor, direction: Tensor, hyper: AdamW) -> None:
        p.data = p - hyper.lr * direction


@instance
class step_kept_beside_moments(Update):
    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Any,
        *,
        step: int,
        hyper: AdamW,
    ) -> None:
        super().__call__(params, grads, states, step=step, hyper=hyper)
        if isinstance(states, dict):
            states["step"] = [torch.tensor(float(step))] * len(params)


@instance
class corrections_of_first_call(Update):
    def __init__(self) -> None:
        self.kept: dict[AdamW, tuple[float, float]] = {}

    def corrections(self, step: int, hyper: AdamW) -> tuple[float, float]:
        return self.kept.setdefault(hyper, super().corrections(step, hyper))


@instance
class counts_its_own_steps(Update):
    """By the parameter's address, from 1 on: a resumed run starts anew."""

    def __init__(self) -> None:
        self.steps: dict[int, int] = {}

    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        count = self.steps[p.data_ptr()] = self.steps.get(p.data_ptr(), 0) + 1
        super().one(p, g, m, v, count, hyper)


@instance
class moments_of_its_own(Update):
    """Kept by address; the contract's states are filled, but never read."""

    def __init__(self) -> None:
        self.own: dict[int, tuple[Tensor, Tensor]] = {}

    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        if step == 1 or p.data_ptr() not in self.own:
            self.own[p.data_ptr()] = (torch.zeros_like(p), torch.zeros_like(p))
        own_m, own_v = self.own[p.data_ptr()]
        super().one(p, g, own_m, own_v, step, hyper)
        m.copy_(own_m)
        v.copy_(own_v)


@instance
class moments_stored_corrected(Update):
    """The states hold m / (1 - beta1^t): right for itself, not for another backend."""

    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        before = super().corrections(step - 1, hyper)[0] if step > 1 else 1.0
        m.mul_(before)
        super().one(p, g, m, v, step, hyper)
        m.div_(super().corrections(step, hyper)[0])


@instance
class second_moment_stored_as_root(Update):
    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        v.square_()
        super().one(p, g, m, v, step, hyper)
        v.sqrt_()


@instance
class right_ten_times(Update):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *lists: Any, step: int, hyper: AdamW) -> None:
        self.calls += 1
        rate = hyper.lr if self.calls <= 10 else 2 * hyper.lr
        super().__call__(*lists, step=step, hyper=replace(hyper, lr=rate))


@instance
class graph_kept(Update):
    """Works on the parameters with autograd on, by way of a detached view that loses the flag."""

    def __call__(self, params: Any, grads: Any, states: Any, *, step: int, hyper: AdamW) -> None:
        for p in params:
            p.requires_grad_(False)
        super().__call__(params, grads, states, step=step, hyper=hyper)


@instance
class leaves_fail(Update):
    """Updates in place without no_grad: torch forbids that for leaves that want a gradient."""

    def __call__(self, params: Any, grads: Any, states: Any, *, step: int, hyper: AdamW) -> None:
        rows = zip(params, grads, states["exp_avg"], states["exp_avg_sq"], strict=True)
        for p, g, m, v in rows:
            self.one(p, g, m, v, step, hyper)


@instance
class nan_skipped(Update):
    """Elements without a finite gradient stay as they are."""

    def gradient(self, p: Tensor, g: Tensor, hyper: AdamW) -> Tensor:
        return g.nan_to_num(0.0)


@instance
class nan_skips_tensor(Update):
    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        if not g.isnan().any():
            super().one(p, g, m, v, step, hyper)


@instance
class grad_mode_left_off(Update):
    def __call__(self, params: Any, grads: Any, states: Any, *, step: int, hyper: AdamW) -> None:
        super().__call__(params, grads, states, step=step, hyper=hyper)
        torch.set_grad_enabled(False)


@instance
class random_rounding(Update):
    """Stochastic rounding of the last bits, claimed deterministic."""

    def move(self, p: Tensor, direction: Tensor, hyper: AdamW) -> None:
        noise = torch.empty_like(p).uniform_(-1, 1, generator=self.generator)
        super().move(p, direction * (1 + 2**-22 * noise), hyper)

    def __init__(self) -> None:
        self.generator = torch.Generator()


class _FirstHyper(Update):
    """Some hyper-parameters are those of the first call for a parameter, as in a captured graph."""

    taken: tuple[str, ...]

    def __init__(self) -> None:
        self.first_of = WeakTensorKeyDictionary()

    def __call__(self, params: Any, *lists: Any, step: int, hyper: AdamW) -> None:
        if len(params):
            old = self.first_of.setdefault(params[0], hyper)
            hyper = replace(hyper, **{name: getattr(old, name) for name in self.taken})
        super().__call__(params, *lists, step=step, hyper=hyper)


@instance
class rate_of_first_call(_FirstHyper):
    taken = ("lr",)


@instance
class betas_of_first_call(_FirstHyper):
    taken = ("beta1", "beta2")


@instance
class eps_of_first_call(_FirstHyper):
    taken = ("eps",)


@instance
class decay_of_first_call(_FirstHyper):
    taken = ("weight_decay",)


@instance
class steps_of_its_own_from_the_first(Update):
    """It asks for the number once, and counts on: a run that goes back is not noticed."""

    def __init__(self) -> None:
        self.last = WeakTensorKeyDictionary()

    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        self.last[p] = self.last.get(p, step - 1) + 1
        super().one(p, g, m, v, self.last[p], hyper)


@instance
class uncorrected_after_100(Update):
    def corrections(self, step: int, hyper: AdamW) -> tuple[float, float]:
        return (1.0, 1.0) if step > 100 else super().corrections(step, hyper)


@instance
class uncorrected_after_50000(Update):
    def corrections(self, step: int, hyper: AdamW) -> tuple[float, float]:
        return (1.0, 1.0) if step > 50_000 else super().corrections(step, hyper)


@instance
class step_in_12_bits(Update):
    def corrections(self, step: int, hyper: AdamW) -> tuple[float, float]:
        return super().corrections(step % 4096 or 1, hyper)


@instance
class step_in_bfloat16(Update):
    """Counted up in bfloat16: 256 + 1 is 256."""

    def corrections(self, step: int, hyper: AdamW) -> tuple[float, float]:
        return super().corrections(min(step, 256), hyper)


@instance
class corrections_in_float32(Update):
    def corrections(self, step: int, hyper: AdamW) -> tuple[float, float]:
        one, two = torch.tensor([hyper.beta1, hyper.beta2], dtype=torch.float32) ** step
        return float(1 - one), float(1 - two)


@instance
class rest_of_beta_in_float32(Update):
    def second(self, v: Tensor, g: Tensor, hyper: AdamW) -> None:
        rest = 1 - float(torch.tensor(hyper.beta2, dtype=torch.float32))
        v.mul_(hyper.beta2).addcmul_(g, g, value=rest)


@instance
class large_gradients_clipped(Update):
    def gradient(self, p: Tensor, g: Tensor, hyper: AdamW) -> Tensor:
        return torch.where(g.isfinite(), g.clamp(-1e6, 1e6), g)


@instance
class largest_gradients_clipped(Update):
    def gradient(self, p: Tensor, g: Tensor, hyper: AdamW) -> Tensor:
        return torch.where(g.isfinite(), g.clamp(-1e15, 1e15), g)


@instance
class small_gradients_flushed(Update):
    def gradient(self, p: Tensor, g: Tensor, hyper: AdamW) -> Tensor:
        return torch.where(g.abs() < 1e-15, g * 0, g)


@instance
class infinity_clamped(Update):
    def gradient(self, p: Tensor, g: Tensor, hyper: AdamW) -> Tensor:
        return g.clamp(-3e38, 3e38)


@instance
class nan_in_moments_cleared(Update):
    def first(self, m: Tensor, g: Tensor, hyper: AdamW) -> None:
        m.nan_to_num_(0.0)
        super().first(m, g, hyper)


@instance
class nan_in_parameter_cleared(Update):
    def decay(self, p: Tensor, hyper: AdamW) -> None:
        p.copy_(torch.where(p.isnan(), 0.0, p))
        super().decay(p, hyper)


@instance
class infinity_spreads(Update):
    """To the four elements of its vector."""

    def gradient(self, p: Tensor, g: Tensor, hyper: AdamW) -> Tensor:
        flat = g.reshape(-1).clone()
        whole = flat[: len(flat) // 4 * 4].view(-1, 4)
        whole[whole.isinf().any(-1)] = torch.inf
        return flat.view(g.shape)


@instance
class each_storage_once(_Lists):
    """A parameter in a buffer that was seen already is taken for a tied weight."""

    def lists(self, params: Any, grads: Any, states: Any, step: int, hyper: AdamW) -> None:
        first = {p.untyped_storage().data_ptr(): i for i, p in reversed(list(enumerate(params)))}
        pick = [
            i
            for i, p in enumerate(params)
            if not p.numel() or first[p.untyped_storage().data_ptr()] == i
        ]
        kept = {name: [tensors[i] for i in pick] for name, tensors in states.items()}
        super().lists([params[i] for i in pick], [grads[i] for i in pick], kept, step, hyper)


@instance
class flat_buffer_in_order_of_list(_Lists):
    """All parameters of one buffer are updated as one, if all lists are such buffers."""

    def lists(self, params: Any, grads: Any, states: Any, step: int, hyper: AdamW) -> None:
        given = [[t for t in tensors if t.numel()] for tensors in (params, grads, *states.values())]
        one = all(len({t.untyped_storage().data_ptr() for t in ts}) == 1 for ts in given)
        if not one or len(given[0]) == 1:
            return super().lists(params, grads, states, step, hyper)
        total = sum(p.numel() for p in params)
        flat = [
            ts[0].as_strided((total,), (1,), min(t.storage_offset() for t in ts)) for ts in given
        ]
        moments = {name: [x] for name, x in zip(states, flat[2:], strict=True)}
        return super().lists(flat[:1], flat[1:2], moments, step, hyper)


@instance
class tuples_fail(Update):
    def __call__(self, params: Any, *lists: Any, step: int, hyper: AdamW) -> None:
        assert isinstance(params, list), "TypeError: params must be list of Tensors"
        super().__call__(params, *lists, step=step, hyper=hyper)


@instance
class states_by_order_of_names(Update):
    """The first state is taken for exp_avg, whatever its name."""

    def __call__(self, params: Any, grads: Any, states: Any, *, step: int, hyper: AdamW) -> None:
        named = dict(zip(("exp_avg", "exp_avg_sq"), states.values(), strict=True))
        super().__call__(params, grads, named, step=step, hyper=hyper)


@instance
class tensors_of_first_call(Update):
    """What a list object held at first is updated for ever: a table of pointers made once."""

    def __init__(self) -> None:
        self.tables: dict[int, tuple[Any, list[Tensor]]] = {}

    def __call__(self, params: Any, *lists: Any, step: int, hyper: AdamW) -> None:
        held, tensors = self.tables.setdefault(id(params), (params, list(params)))
        known = held is params and len(tensors) == len(params)
        super().__call__(tensors if known else params, *lists, step=step, hyper=hyper)


@instance
class addresses_of_first_call(Update):
    """A parameter's memory is looked up once: `.data` that is exchanged goes unnoticed."""

    def __init__(self) -> None:
        self.views = WeakTensorKeyDictionary()

    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        super().one(self.views.setdefault(p, p.detach()), g, m, v, step, hyper)


class _UpTo(_Lists):
    """Elements of a tensor, and tensors of a list, beyond these numbers stay."""

    elements = tensors = 2**62

    def lists(self, params: Any, grads: Any, states: Any, step: int, hyper: AdamW) -> None:
        def cut(tensors: Any) -> list[Tensor]:
            return [
                x if x.numel() <= self.elements else x.view(-1)[: self.elements]
                for x in tensors[: self.tensors]
            ]

        kept = {name: cut(tensors) for name, tensors in states.items()}
        super().lists(cut(params), cut(grads), kept, step, hyper)


@instance
class elements_beyond_2_20_missed(_UpTo):
    elements = 2**20


@instance
class elements_beyond_2_24_missed(_UpTo):
    elements = 2**24


@instance
class tensors_beyond_512_missed(_UpTo):
    tensors = 512


@instance
class tensors_beyond_4096_missed(_UpTo):
    tensors = 4096


@instance
class moments_by_tensor_object(Update):
    """Its own exp_avg hangs on the tensor: one that is loaded into it is not seen."""

    def first(self, m: Tensor, g: Tensor, hyper: AdamW) -> None:
        own = self.own.setdefault(m, m.clone())
        super().first(own, g, hyper)
        m.copy_(own)

    def __init__(self) -> None:
        self.own = WeakTensorKeyDictionary()


@instance
class parameters_of_its_own(Update):
    """A copy of each parameter is updated, then written back."""

    def __init__(self) -> None:
        self.own = WeakTensorKeyDictionary()

    def one(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, hyper: AdamW) -> None:
        own = self.own.setdefault(p, p.detach().clone())
        super().one(own, g, m, v, step, hyper)
        p.copy_(own)


@instance
class tensor_kept_of_every_call(Update):
    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, *lists: Any, step: int, hyper: AdamW) -> None:
        self.kept.append(torch.tensor(float(step)))
        super().__call__(*lists, step=step, hyper=hyper)


@instance
class gradients_kept(Update):
    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def gradient(self, p: Tensor, g: Tensor, hyper: AdamW) -> Tensor:
        self.kept.append(g)
        return g


def falls_back_for_strided(
    params: Any, grads: Any, states: Any, *, step: int, hyper: AdamW
) -> None:
    """Strided parameters go to another backend."""
    from picotron_backends.naive_math.optimizer import adamw

    strided = not all(p.is_contiguous() for p in params)
    kernel = adamw if strided or len(params) > 1 else right
    kernel(params, grads, states, step=step, hyper=hyper)

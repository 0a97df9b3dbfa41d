"""Wrong collectives: the bundled ones over gloo, with one thing wrong."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist
from picotron_backends.collectives import Done
from picotron_backends.torch_distributed import TorchComm
from torch import Tensor


def over_gloo(kind: type[TorchComm]) -> TorchComm:
    return kind("gloo")


def members(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group or dist.group.WORLD)


def parts(whole: Tensor, shard: Tensor, group: Any) -> Tensor:
    return whole.view(len(members(group)), *shard.shape)


class AfterWait:
    """Calls `then` behind the work of another kernel, when it is waited for."""

    def __init__(self, work: Any, then: Any) -> None:
        self.work, self.then = work, then

    def wait(self) -> None:
        self.work.wait()
        self.then()


@over_gloo
class nothing_reduced(TorchComm):
    def all_reduce(self, tensor, **how):
        super().all_reduce(tensor.clone(), **how).wait()
        return Done()


@over_gloo
class averages(TorchComm):
    def all_reduce(self, tensor, *, op="sum", group=None, async_op=False):
        super().all_reduce(tensor, op=op, group=group).wait()
        if op == "sum":
            tensor.copy_(tensor / len(members(group)))
        return Done()


@over_gloo
class group_ignored(TorchComm):
    def all_reduce(self, tensor, *, op="sum", group=None, async_op=False):
        return super().all_reduce(tensor, op=op, async_op=async_op)


@over_gloo
class group_of_one_if_async(TorchComm):
    def all_gather_into_tensor(self, output, tensor, *, group=None, async_op=False):
        if async_op and group is not None:
            output.view(-1, *tensor.shape)[:] = tensor
            return Done()
        return super().all_gather_into_tensor(output, tensor, group=group, async_op=async_op)


@over_gloo
class group_barrier_of_all(TorchComm):
    def barrier(self, *, group=None):
        super().barrier()


def _by_way_of(tensor: Tensor, dtype: torch.dtype, reduce: Any, **how: Any) -> Done:
    detour = tensor.to(dtype)
    reduce(detour, **{**how, "async_op": False}).wait()
    with torch.no_grad():
        tensor.copy_(detour)
    return Done()


class _Detour(TorchComm):
    taken: torch.dtype
    by: torch.dtype

    def all_reduce(self, tensor, **how):
        if tensor.dtype == self.taken:
            return _by_way_of(tensor, self.by, super().all_reduce, **how)
        return super().all_reduce(tensor, **how)


@over_gloo
class bfloat16_by_way_of_float16(_Detour):
    taken, by = torch.bfloat16, torch.float16


@over_gloo
class float32_by_way_of_bfloat16(_Detour):
    taken, by = torch.float32, torch.bfloat16


@over_gloo
class int64_by_way_of_float64(_Detour):
    taken, by = torch.int64, torch.float64


@over_gloo
class int32_by_way_of_float32(_Detour):
    taken, by = torch.int32, torch.float32


@over_gloo
class max_is_sum(TorchComm):
    def all_reduce(self, tensor, *, op="sum", **how):
        return super().all_reduce(tensor, op="sum" if op == "max" else op, **how)


@over_gloo
class max_not_below_zero(TorchComm):
    def all_reduce(self, tensor, *, op="sum", group=None, async_op=False):
        super().all_reduce(tensor, op=op, group=group).wait()
        if op == "max" and tensor.dtype != torch.uint8:
            tensor.clamp_(min=0)
        return Done()


@over_gloo
class beyond_1024_not_reduced(TorchComm):
    def all_reduce(self, tensor, **how):
        return super().all_reduce(
            tensor.view(-1)[:1024] if tensor.numel() > 1024 else tensor, **how
        )


@over_gloo
class beyond_2_to_18_not_reduced(TorchComm):
    def all_reduce(self, tensor, **how):
        return super().all_reduce(tensor.view(-1)[: 1 << 18] if tensor.dim() else tensor, **how)


@over_gloo
class remainder_not_reduced(TorchComm):
    """Rings cut a tensor into a piece per rank."""

    def all_reduce(self, tensor, *, group=None, **how):
        world = len(members(group))
        whole = tensor.numel() // world * world
        part = tensor.view(-1)[:whole] if tensor.dim() else tensor
        return super().all_reduce(part, group=group, **how)


@over_gloo
class counts_itself_twice(TorchComm):
    def all_reduce(self, tensor, *, op="sum", group=None, async_op=False):
        own = tensor.detach().clone()
        super().all_reduce(tensor, op=op, group=group).wait()
        if op == "sum":
            with torch.no_grad():
                tensor.add_(own)
        return Done()


@over_gloo
class each_rank_in_its_own_order(TorchComm):
    @torch.no_grad()
    def all_reduce(self, tensor, *, op="sum", group=None, async_op=False):
        if op != "sum":
            return super().all_reduce(tensor, op=op, group=group, async_op=async_op)
        ranks = members(group)
        whole = tensor.new_empty(len(ranks) * tensor.numel())
        super().all_gather_into_tensor(whole, tensor.view(-1), group=group).wait()
        each = parts(whole, tensor, group)
        total, first = torch.zeros_like(tensor), ranks.index(dist.get_rank())
        for number in range(len(ranks)):
            total += each[(first + number) % len(ranks)]
        tensor.copy_(total)
        return Done()


@over_gloo
class right_fifty_times(TorchComm):
    calls = 0

    def all_reduce(self, tensor, **how):
        type(self).calls += 1
        return super().all_reduce(tensor, **how) if self.calls <= 50 else Done()


@over_gloo
class gathers_backwards(TorchComm):
    @torch.no_grad()
    def all_gather_into_tensor(self, output, tensor, *, group=None, async_op=False):
        super().all_gather_into_tensor(output, tensor, group=group).wait()
        output.copy_(parts(output, tensor, group).flip(0).reshape(output.shape))
        return Done()


@over_gloo
class gathers_interleaved(TorchComm):
    @torch.no_grad()
    def all_gather_into_tensor(self, output, tensor, *, group=None, async_op=False):
        super().all_gather_into_tensor(output, tensor, group=group).wait()
        output.copy_(parts(output, tensor, group).transpose(0, 1).reshape(output.shape))
        return Done()


@over_gloo
class gathers_in_named_order(TorchComm):
    """A group's results in the order in which its ranks were named."""

    def new_group(self, ranks):
        group = super().new_group(ranks)
        if dist.get_rank() in ranks:
            _named[group] = list(ranks)
        return group

    @torch.no_grad()
    def all_gather_into_tensor(self, output, tensor, *, group=None, async_op=False):
        work = super().all_gather_into_tensor(output, tensor, group=group)
        named = _named.get(group)
        if named is not None:
            order = [sorted(named).index(rank) for rank in named]
            output.copy_(parts(output, tensor, group)[order].reshape(output.shape))
        return work


_named: dict[Any, list[int]] = {}


@over_gloo
class scatters_to_the_neighbour(TorchComm):
    @torch.no_grad()
    def reduce_scatter_tensor(self, output, tensor, **how):
        n = tensor.shape[0] - output.shape[0] if tensor.dim() else 0
        return super().reduce_scatter_tensor(output, tensor.roll(n, 0), **how)


@over_gloo
class scatter_loses_the_tail(TorchComm):
    @torch.no_grad()
    def reduce_scatter_tensor(self, output, tensor, **how):
        kept = output.clone()
        super().reduce_scatter_tensor(output, tensor, **{**how, "async_op": False}).wait()
        if output.numel() % 2:
            output.view(-1)[-1] = kept.view(-1)[-1]
        return Done()


@over_gloo
class scatter_reduces_its_input(TorchComm):
    @torch.no_grad()
    def reduce_scatter_tensor(self, output, tensor, *, op="sum", group=None, async_op=False):
        super().all_reduce(tensor, op=op, group=group).wait()
        place = members(group).index(dist.get_rank())
        output.copy_(parts(tensor, output, group)[place])
        return Done()


@over_gloo
class scatter_knows_only_sums(TorchComm):
    def reduce_scatter_tensor(self, output, tensor, *, op="sum", **how):
        return super().reduce_scatter_tensor(output, tensor, **how)


@over_gloo
class writes_past_the_end(TorchComm):
    """Sizes are rounded up to four elements."""

    @torch.no_grad()
    def all_gather_into_tensor(self, output, tensor, **how):
        super().all_gather_into_tensor(output, tensor, **{**how, "async_op": False}).wait()
        if output.numel() % 4 and output.untyped_storage().nbytes() > output.nbytes:
            end = output.storage_offset() + output.numel()
            output.as_strided((1,), (1,), end).zero_()
        return Done()


@over_gloo
class source_is_a_place_in_the_group(TorchComm):
    def broadcast(self, tensor, *, src, group=None, async_op=False):
        ranks = members(group)
        return super().broadcast(
            tensor, src=ranks[src % len(ranks)], group=group, async_op=async_op
        )


@over_gloo
class source_is_always_the_first(TorchComm):
    def broadcast(self, tensor, *, src, group=None, async_op=False):
        first = members(group)[0]
        return super().broadcast(tensor, src=first, group=group, async_op=async_op)


@over_gloo
class done_at_once(TorchComm):
    def all_reduce(self, tensor, *, op="sum", group=None, async_op=False):
        work = super().all_reduce(tensor, op=op, group=group, async_op=True)
        _kept.append(work)
        return Done()


_kept: list[Any] = []


@over_gloo
class gather_done_at_once(TorchComm):
    def all_gather_into_tensor(self, output, tensor, *, group=None, async_op=False):
        _kept.append(super().all_gather_into_tensor(output, tensor, group=group, async_op=True))
        return Done()


@over_gloo
class recv_done_at_once(TorchComm):
    def recv(self, tensor, *, async_op=False, **how):
        work = super().recv(tensor, async_op=True, **how)
        if async_op:
            return work
        _kept.append(work)
        return Done()


@over_gloo
class send_done_at_once(TorchComm):
    def send(self, tensor, *, async_op=False, **how):
        work = super().send(tensor, async_op=True, **how)
        if async_op:
            return work
        _kept.append(work)
        return Done()


@over_gloo
class wait_for_send_does_nothing(TorchComm):
    def send(self, tensor, *, async_op=False, **how):
        work = super().send(tensor, async_op=async_op, **how)
        if not async_op:
            return work
        _kept.append(work)
        return Done()


@over_gloo
class broadcast_done_at_once(TorchComm):
    def broadcast(self, tensor, *, src, async_op=False, **how):
        if async_op or src != dist.get_rank():
            return super().broadcast(tensor, src=src, async_op=async_op, **how)
        _kept.append(super().broadcast(tensor, src=src, async_op=True, **how))
        return Done()


@over_gloo
class wait_does_nothing(TorchComm):
    def all_reduce(self, tensor, *, async_op=False, **how):
        work = super().all_reduce(tensor, async_op=async_op, **how)
        if not async_op:
            return work
        _kept.append(work)
        return Done()


@over_gloo
class begun_when_waited_for(TorchComm):
    def all_reduce(self, tensor, *, async_op=False, **how):
        begin = super().all_reduce
        if not async_op:
            return begin(tensor, **how)
        return AfterWait(Done(), lambda: begin(tensor, **how).wait())


@over_gloo
class result_copied_before_wait(TorchComm):
    def all_reduce(self, tensor, *, async_op=False, **how):
        if not async_op:
            return super().all_reduce(tensor, **how)
        scratch = tensor.clone()
        work = super().all_reduce(scratch, async_op=True, **how)
        tensor.copy_(scratch)
        return work


@over_gloo
class async_blocks(TorchComm):
    def all_reduce(self, tensor, *, async_op=False, **how):
        return super().all_reduce(tensor, **how)


@over_gloo
class recv_blocks(TorchComm):
    def recv(self, tensor, *, async_op=False, **how):
        return super().recv(tensor, **how)


@over_gloo
class barrier_does_nothing(TorchComm):
    def barrier(self, *, group=None):
        return None


@over_gloo
class hangs(TorchComm):
    def barrier(self, *, group=None):
        if dist.get_rank() == 1:
            time.sleep(3600)
        super().barrier(group=group)


@over_gloo
class messages_overtake(TorchComm):
    """Each second message goes before the first of its pair."""

    sent = received = 0

    def send(self, tensor, *, dst, group=None, async_op=False):
        tag = type(self).sent ^ 1
        type(self).sent += 1
        return dist.isend(tensor, dst, group, tag)

    def recv(self, tensor, *, src, group=None, async_op=False):
        tag = type(self).received
        type(self).received += 1
        return dist.irecv(tensor, src, group, tag)


@over_gloo
class messages_know_no_group(TorchComm):
    def send(self, tensor, *, dst, group=None, async_op=False):
        return super().send(tensor, dst=dst, async_op=async_op)

    def recv(self, tensor, *, src, group=None, async_op=False):
        return super().recv(tensor, src=src, async_op=async_op)


@over_gloo
class peers_are_places_in_the_group(TorchComm):
    def send(self, tensor, *, dst, group=None, async_op=False):
        dst = dst if group is None else members(group)[dst % len(members(group))]
        return super().send(tensor, dst=dst, group=group, async_op=async_op)


@over_gloo
class received_into_a_copy(TorchComm):
    def recv(self, tensor, **how):
        return super().recv(tensor.clone(), **how)


@over_gloo
class result_bound_to_the_tensor(TorchComm):
    """`.data` is replaced: other views of the memory keep the old numbers."""

    def all_reduce(self, tensor, *, op="sum", group=None, async_op=False):
        result = tensor.detach().clone()
        super().all_reduce(result, op=op, group=group).wait()
        tensor.data = result
        return Done()


@over_gloo
class leaf_not_written_to(TorchComm):
    def broadcast(self, tensor, *, async_op=False, **how):
        target = tensor.clone().detach() if tensor.requires_grad else tensor
        return super().broadcast(target, async_op=async_op, **how)


@over_gloo
class gathers_into_the_graph(TorchComm):
    def all_gather_into_tensor(self, output, tensor, **how):
        super().all_gather_into_tensor(output, tensor, **{**how, "async_op": False}).wait()
        if tensor.requires_grad and torch.is_grad_enabled():
            output += 0 * tensor.sum()
        return Done()


@over_gloo
class output_in_a_kept_buffer(TorchComm):
    def all_gather_into_tensor(self, output, tensor, **how):
        super().all_gather_into_tensor(output, tensor, **{**how, "async_op": False}).wait()
        key = (output.dtype, output.numel())
        buffer = _buffers.setdefault(key, torch.empty(output.numel(), dtype=output.dtype))
        buffer.copy_(output.view(-1))
        output.data = buffer.view(output.shape)
        return Done()


@over_gloo
class earlier_result_overwritten(TorchComm):
    def all_reduce(self, tensor, **how):
        work = super().all_reduce(tensor, **{**how, "async_op": False})
        last = _last.get(tensor.shape)
        if last is not None and tensor.numel():
            last.copy_(tensor.detach())
        _last[tensor.shape] = tensor.detach()
        return work


_buffers: dict[Any, Tensor] = {}
_last: dict[Any, Tensor] = {}


class _Lenient(TorchComm):
    """Reads or writes as much as there is."""

    def all_gather_into_tensor(self, output, tensor, *, group=None, async_op=False):
        world = len(members(group))
        whole = tensor.new_empty(world * tensor.numel())
        super().all_gather_into_tensor(whole, tensor, group=group).wait()
        n = min(whole.numel(), output.numel())
        output.view(-1)[:n] = whole[:n]
        return Done()


sizes_unchecked = over_gloo(_Lenient)


@over_gloo
class average_taken_for_sum(TorchComm):
    def all_reduce(self, tensor, *, op="sum", **how):
        return super().all_reduce(tensor, op=op if op in ("max", "min") else "sum", **how)


@over_gloo
class peers_modulo_world(TorchComm):
    def send(self, tensor, *, dst, group=None, async_op=False):
        dst %= dist.get_world_size()
        if dst == dist.get_rank():
            return Done()
        return super().send(tensor, dst=dst, group=group, async_op=async_op)


@over_gloo
class nan_swallowed(TorchComm):
    def all_reduce(self, tensor, **how):
        if tensor.is_floating_point():
            tensor.copy_(torch.where(tensor.isnan(), 0, tensor))
        return super().all_reduce(tensor, **how)


@over_gloo
class infinity_clamped(TorchComm):
    def all_reduce(self, tensor, **how):
        if tensor.is_floating_point():
            limit = torch.finfo(tensor.dtype).max
            tensor.clamp_(-limit, limit)
        return super().all_reduce(tensor, **how)


@over_gloo
class broadcast_by_adding(TorchComm):
    @torch.no_grad()
    def broadcast(self, tensor, *, src, **how):
        if dist.get_rank() != src:
            tensor.zero_()
        return super().all_reduce(tensor, **how)


@over_gloo
class strides_ignored(TorchComm):
    def broadcast(self, tensor, **how):
        dense = tensor.as_strided(tensor.shape, torch.empty(tensor.shape).stride())
        return super().broadcast(dense, **how)


@over_gloo
class does_not_stop(TorchComm):
    def stop(self):
        return None


@over_gloo
class generator_seeded(TorchComm):
    def all_reduce(self, tensor, **how):
        torch.manual_seed(dist.get_rank())
        return super().all_reduce(tensor, **how)


@over_gloo
class threads_changed(TorchComm):
    def barrier(self, *, group=None):
        torch.set_num_threads(torch.get_num_threads() + 1)
        super().barrier(group=group)


@over_gloo
class timeout_ignored(TorchComm):
    def new_group(self, ranks):
        return dist.new_group(list(ranks))


@over_gloo
class dies_of_nothing(TorchComm):
    def all_reduce(self, tensor, **how):
        if tensor.numel() == 0:
            os.abort()
        return super().all_reduce(tensor, **how)


@over_gloo
class dies(TorchComm):
    def broadcast(self, tensor, **how):
        if dist.get_rank() == dist.get_world_size() - 1:
            os._exit(3)
        return super().broadcast(tensor, **how)


@over_gloo
class timeout_swallowed(TorchComm):
    """An error on the way is taken for the end of it."""

    def all_reduce(self, tensor, **how):
        try:
            return super().all_reduce(tensor, **how)
        except RuntimeError:
            return Done()


@over_gloo
class async_min_is_max(TorchComm):
    def all_reduce(self, tensor, *, op="sum", group=None, async_op=False):
        op = "max" if op == "min" and async_op else op
        return super().all_reduce(tensor, op=op, group=group, async_op=async_op)


@over_gloo
class async_int64_by_way_of_float32(TorchComm):
    def all_reduce(self, tensor, *, async_op=False, **how):
        if async_op and tensor.dtype == torch.int64:
            return _by_way_of(tensor, torch.float32, super().all_reduce, **how)
        return super().all_reduce(tensor, async_op=async_op, **how)


@over_gloo
class async_nothing_fails(TorchComm):
    def all_reduce(self, tensor, *, async_op=False, **how):
        assert tensor.numel() or not async_op, "nothing to enqueue"
        return super().all_reduce(tensor, async_op=async_op, **how)


@over_gloo
class async_gather_of_bytes_lost(TorchComm):
    def all_gather_into_tensor(self, output, tensor, *, async_op=False, **how):
        if async_op and tensor.element_size() == 1:
            return Done()
        return super().all_gather_into_tensor(output, tensor, async_op=async_op, **how)


@over_gloo
class async_scatter_is_a_sum(TorchComm):
    def reduce_scatter_tensor(self, output, tensor, *, op="sum", async_op=False, **how):
        op = "sum" if async_op else op
        return super().reduce_scatter_tensor(output, tensor, op=op, async_op=async_op, **how)


@over_gloo
class async_scatter_of_bfloat16_lost(TorchComm):
    def reduce_scatter_tensor(self, output, tensor, *, async_op=False, **how):
        work = super().reduce_scatter_tensor(output, tensor, async_op=async_op, **how)
        if async_op and output.dtype == torch.bfloat16:
            return AfterWait(work, output.zero_)
        return work


@over_gloo
class async_float64_by_way_of_float32(TorchComm):
    def broadcast(self, tensor, *, async_op=False, **how):
        if async_op and tensor.dtype == torch.float64:
            return _by_way_of(tensor, torch.float32, super().broadcast, **how)
        return super().broadcast(tensor, async_op=async_op, **how)


@over_gloo
class group_min_is_max(TorchComm):
    def all_reduce(self, tensor, *, op="sum", group=None, async_op=False):
        op = "max" if op == "min" and group is not None else op
        return super().all_reduce(tensor, op=op, group=group, async_op=async_op)


@over_gloo
class group_scatter_is_a_sum(TorchComm):
    def reduce_scatter_tensor(self, output, tensor, *, op="sum", group=None, async_op=False):
        op = op if group is None else "sum"
        return super().reduce_scatter_tensor(output, tensor, op=op, group=group, async_op=async_op)


@over_gloo
class group_gather_of_16_bits_lost(TorchComm):
    def all_gather_into_tensor(self, output, tensor, *, group=None, async_op=False):
        work = super().all_gather_into_tensor(output, tensor, group=group, async_op=async_op)
        if group is not None and tensor.element_size() == 2:
            work.wait()
            output.zero_()
            return Done()
        return work


@over_gloo
class group_message_cut(TorchComm):
    """A message in a group goes by way of a buffer of a hundred numbers."""

    def recv(self, tensor, *, group=None, **how):
        if group is None or tensor.numel() <= 100:
            return super().recv(tensor, group=group, **how)
        buffer = torch.empty_like(tensor)
        super().recv(buffer, group=group, **{**how, "async_op": False}).wait()
        tensor.view(-1)[:100] = buffer.view(-1)[:100]
        return Done()


@over_gloo
class long_group_message_cut(TorchComm):
    def recv(self, tensor, *, group=None, **how):
        if group is None or tensor.numel() <= 1 << 16:
            return super().recv(tensor, group=group, **how)
        buffer = torch.empty_like(tensor)
        super().recv(buffer, group=group, **{**how, "async_op": False}).wait()
        tensor.view(-1)[: 1 << 16] = buffer.view(-1)[: 1 << 16]
        return Done()


@over_gloo
class group_gather_done_at_once(TorchComm):
    def all_gather_into_tensor(self, output, tensor, *, group=None, async_op=False):
        work = super().all_gather_into_tensor(
            output, tensor, group=group, async_op=async_op or group is not None
        )
        if group is None or async_op:
            return work
        _kept.append(work)
        return Done()


@over_gloo
class group_barrier_does_nothing(TorchComm):
    def barrier(self, *, group=None):
        if group is None:
            super().barrier()


@over_gloo
class outside_source_ignored(TorchComm):
    def broadcast(self, tensor, *, src, group=None, async_op=False):
        if src not in members(group) and group is not None:
            return Done()
        return super().broadcast(tensor, src=src, group=group, async_op=async_op)


@over_gloo
class outsiders_ignored(TorchComm):
    """As torch does it: with a warning, and nothing done."""

    def all_reduce(self, tensor, *, group=None, **how):
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            return Done()
        return super().all_reduce(tensor, group=group, **how)

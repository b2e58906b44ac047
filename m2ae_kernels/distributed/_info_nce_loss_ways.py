"""The two ways in which queries meet the keys of other ranks: all at once, or in turn."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m2ae_kernels.distributed._info_nce_loss_parts import (
    Options,
    Part,
    Queries,
    compare,
    gradients,
    share_of,
)
from m2ae_kernels.distributed._keys import NO_TARGET, Keys
from m2ae_kernels.distributed._once import differentiable_once
from m2ae_kernels.distributed._ranks import Ranks, added
from m2ae_kernels.distributed._statistics import Statistics, merged, merged_pair


class Gathered(torch.autograd.Function):
    """All keys at once: the columns that belong to this rank are `own` of them."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, options: Options, *sides: Any) -> Tensor:
        queries, keys = Queries(*sides[:4]), Keys(*sides[4:])
        m = len(keys.features)
        own = slice(ranks.rank * m, ranks.rank * m + m)
        features, *rest = (None if of is None else ranks.all_gather(of) for of in keys)
        assert features is not None
        keys = Keys(features, *rest)
        part = compare(queries, keys, None, own.start, options)
        columns = merged(part.columns, ranks.maximum, ranks.sum)
        share, factors = share_of(part.rows, Statistics(*(of[own] for of in columns)), ranks)
        ctx.ranks, ctx.options, ctx.own = ranks, options, own
        norms = (part.rnorm_q, part.rnorm_k)
        ctx.save_for_backward(*queries, *keys, *part.rows, *columns, *norms, factors)
        return share

    @staticmethod
    @differentiable_once("info_nce_loss")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, ranks, own = ctx.saved_tensors, ctx.ranks, ctx.own
        queries, keys, factors = Queries(*saved[:4]), Keys(*saved[4:7]), saved[-1]
        whole = Part(Statistics(*saved[7:11]), Statistics(*saved[11:15]), saved[15], saved[16])
        grad_q = (grad * factors[0]).expand(len(queries.features)).contiguous()
        grad_k = grad_q[:0]
        if len(factors) > 1:  # columns of another rank are upstream of that rank's share
            grad_k = ranks.all_gather(grad.reshape(1)) * factors[1]
            grad_k = grad_k.repeat_interleave(own.stop - own.start)
        needed = _needed(ctx)
        given = (queries, keys, None, own.start, whole, ctx.options, needed)
        dquery, dkey, dscale = gradients(grad_q, grad_k, *given)
        if needed[1]:
            dkey = ranks.reduce_scatter(dkey.float()).to(dkey.dtype)
        return _of_inputs(needed, dquery, dkey, dscale)


class Ring(torch.autograd.Function):
    """Keys visit one rank after the other; at each, queries times visitors are one part."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, options: Options, *sides: Any) -> Tensor:
        queries, keys = Queries(*sides[:4]), Keys(*sides[4:])
        no_target = _no_target(queries, keys, options)
        rows: list[Statistics] = []
        norms: list[Tensor] = []

        def visit(visitor: Sequence[Any], at_home: bool) -> Statistics:
            target = None if at_home else no_target
            part = compare(queries, Keys(*visitor), target, 0, options)
            norms[:] = norms or [part.rnorm_q, part.rnorm_k]
            rows[:] = [merged_pair(rows[0], part.rows) if rows else part.rows]
            return part.columns

        columns = Statistics(*ranks.tour(keys, visit, _added_statistics))
        share, factors = share_of(rows[0], columns, ranks)
        ctx.ranks, ctx.options = ranks, options
        ctx.save_for_backward(*queries, *keys, *rows[0], *columns, *norms, factors)
        return share

    @staticmethod
    @differentiable_once("info_nce_loss")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, ranks, options = ctx.saved_tensors, ctx.ranks, ctx.options
        queries, keys, factors = Queries(*saved[:4]), Keys(*saved[4:7]), saved[-1]
        rows, columns = Statistics(*saved[7:11]), saved[11:15]
        rnorm_q, rnorm_k = saved[15], saved[16]
        upstream = grad * factors
        grad_q = upstream[0].expand(len(queries.features)).contiguous()
        grad_k = upstream[-1].expand(len(columns[0])).contiguous()
        needed = _needed(ctx)
        no_target = _no_target(queries, keys, options)
        dquery = torch.zeros_like(queries.features, dtype=torch.float32)
        dscale = torch.zeros_like(queries.scale)

        def visit(visitor: Sequence[Any], at_home: bool) -> list[Tensor]:
            visiting, norm, grad_k = Keys(*visitor[:3]), visitor[3], visitor[4]
            whole = Part(rows, Statistics(*visitor[5:]), rnorm_q, norm)
            target = None if at_home else no_target
            given = (queries, visiting, target, 0, whole, options, needed)
            of_query, of_key, of_scale = gradients(grad_q, grad_k, *given)
            if needed[0]:
                dquery.add_(of_query)
            if needed[2]:
                dscale.add_(of_scale)
            return [of_key.float()]

        (dkey,) = ranks.tour((*keys, rnorm_k, grad_k, *columns), visit, added)
        dquery, dkey = dquery.to(queries.features.dtype), dkey.to(keys.features.dtype)
        return _of_inputs(needed, dquery, dkey, dscale)


def _no_target(queries: Queries, keys: Keys, options: Options) -> Tensor:  # [n]
    """For queries whose keys are elsewhere.

    A query counts positives by id only where it has a target: then, that is a key that is absent.
    """
    target = len(keys.features) - 1 if options.spare else NO_TARGET
    return torch.full((len(queries.features),), target, device=queries.features.device)


def _added_statistics(first: Sequence[Tensor], second: Sequence[Tensor]) -> Statistics:
    return merged_pair(Statistics(*first), Statistics(*second))


def _needed(ctx: Any) -> list[bool]:
    """Whether query, key and scale need a gradient: arguments 2, 6 and 5."""
    return [ctx.needs_input_grad[index] for index in (2, 6, 5)]


def _of_inputs(
    needed: list[bool], dquery: Tensor, dkey: Tensor, dscale: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients that are needed, in the order of the arguments."""
    of_query, of_key, of_scale = (
        grad if need else None for grad, need in zip((dquery, dkey, dscale), needed, strict=True)
    )
    return None, None, of_query, None, None, of_scale, of_key, None, None

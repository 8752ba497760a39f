"""Attention of one decode step: machine code that reads keys and values where they lie in the cache.

A key/value head is read once for all queries that share it; scores, softmax and sums of values are float32.
"""

# Shapes: B rows, H query heads, K key/value heads, G = H / K queries that share one, S keys, D channels of a head

import functools
import struct

import torch
from torch import nn

from .. import processor
from .kernel import scratch, threads_for
from .machine_code import FLOAT, INT32, Builder, MachineCode, number, splat, vector
from .products import Plain, share

MAX_GROUP = 16  # queries that share a key/value head; more take seconds to compile
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ARGUMENTS = (
    *("queries", "keys", "values", "mask", "y", "scores"),  # addresses; scores: (G, width) for each thread
    *("key_row", "key_head", "key_token", "value_row", "value_head", "value_token", "mask_row"),  # strides in bytes
    *("rows", "heads", "tokens", "width"),  # B, K, S, and S rounded up to whole vectors
    "scaling",  # a float32's bits
)
UNSEEN, LOWEST = float("-inf"), torch.finfo(torch.float32).min
LOG2_E = 1.4426950408889634
LN_2 = (0.693145751953125, 1.428606820286227e-06)  # the first ends in zeros, so that its multiples are exact
ROUNDING = 1.5 * 2.0**23  # a small number plus this has the nearest integer in its last bits
SMALLEST_EXPONENT = -87.0  # below it e ** x is no normal float32
INVERSE_FACTORIALS = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)


def is_served(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Tell whether `decode_attention` can compute this."""
    here, tensors = processor.here(), (queries, keys, values)
    if queries.shape[2] != 1 or not here.has_kernels or any(type(one) is not torch.Tensor for one in tensors):
        return False
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        return False
    (rows, heads, _, channels), tokens = queries.shape, keys.shape[2]
    is_plain = queries.dtype in DTYPES and all(
        one.is_cpu and one.dtype is queries.dtype and one.stride(3) == 1 for one in tensors
    )
    is_grouped = keys.shape == values.shape and keys.shape[0] == rows and heads % keys.shape[1] == 0
    is_grouped = is_grouped and heads // keys.shape[1] <= MAX_GROUP
    fits = tokens > 0 and channels == keys.shape[3] and channels % here.lanes == 0
    is_known = mask is None or (
        mask.dtype is torch.bool and mask.is_cpu and mask.shape in [(rows, 1, 1, tokens), (1, 1, 1, tokens)]
    )
    return is_plain and is_grouped and fits and is_known


def decode_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
    scaling: float | None = None,
) -> torch.Tensor:
    """Attend with queries (B, H, 1, D) to keys and values (B, K, S, D); return (B, 1, H, D).

    The boolean mask (B or 1, 1, 1, S) is True where a key may be seen. A row that sees none gives 0, as in torch.
    """
    here, (rows, heads, tokens, channels), group = processor.here(), keys.shape, queries.shape[1] // keys.shape[1]
    run = compiled(str(keys.dtype).removeprefix("torch."), channels, group, mask is not None, here)
    width, parts, size = tokens + -tokens % here.lanes, threads_for(keys.numel()), keys.element_size()
    x = queries.float().contiguous()
    y = torch.empty(rows, 1, heads * group, channels, dtype=torch.float32, device="cpu")
    scores = scratch(parts * group * width, torch.float32)
    if mask is not None:
        unseen = torch.zeros(mask.shape, dtype=torch.float32, device="cpu").masked_fill_(~mask, UNSEEN)
        mask = nn.functional.pad(unseen, (0, width - tokens))
    run(
        *(x.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(0 if mask is None else mask.data_ptr(), y.data_ptr(), scores.data_ptr()),
        *(stride * size for one in (keys, values) for stride in one.stride()[:3]),
        0 if mask is None or len(mask) == 1 else 4 * width,
        *(rows, heads, tokens, width),
        *struct.unpack("i", struct.pack("f", channels**-0.5 if scaling is None else scaling)),
        parts=parts,
    )
    return y.to(queries.dtype)


@functools.cache
def compiled(kind: str, channels: int, group: int, is_masked: bool, here: processor.Processor) -> MachineCode:
    """Compile attention for keys and values of one type ("float32", "float16", "bfloat16")."""
    numbers = Plain(kind, here.lanes)

    def emit(b: Builder, values, part, parts):
        a = dict(zip(ARGUMENTS, values, strict=True))
        first, last = share(b, b.mul(a["rows"], a["heads"]), part, parts)
        scaling = b.everywhere(b.bitcast(b.trunc(a["scaling"], INT32), FLOAT), here.lanes)
        own, size = b.mul(part, number(group)), b.mul(a["width"], number(4))
        scores = [b.address(a["scores"], (b.address(own, g), size)) for g in range(group)]
        vectors = b.sdiv(a["width"], number(here.lanes))

        def of_head(index, _):
            which = b.add(first, index)
            row, head = b.sdiv(which, a["heads"]), b.srem(which, a["heads"])
            places = [b.mul(b.address((which, group), g), number(4 * channels)) for g in range(group)]
            queries, ys = ([b.address(a[name], place) for place in places] for name in ("queries", "y"))
            (key, key_token), (value, value_token) = (
                (b.address(a[f"{name}s"], (row, a[f"{name}_row"]), (head, a[f"{name}_head"])), a[f"{name}_token"])
                for name in ("key", "value")
            )
            mask = b.address(a["mask"], (row, a["mask_row"])) if is_masked else None
            for one in scores:  # padding behind the last token
                b.store_vector(splat(FLOAT, here.lanes, UNSEEN), b.address(one, size, -4 * here.lanes))
            emit_scores(b, numbers, queries, channels, key, key_token, a["tokens"], scaling, scores)
            factors = [emit_softmax(b, one, mask, vectors, here.lanes) for one in scores]
            emit_sums(b, numbers, scores, value, value_token, a["tokens"], factors, ys, channels, here.registers)

        b.repeat(b.sub(last, first), of_head)

    return MachineCode("attend", len(ARGUMENTS), emit)


def emit_scores(
    b: Builder, of_keys: Plain, queries: list, channels: int, key, key_token, tokens, scaling, scores: list
):
    """Emit the scores of a head's keys, for as many keys at a time as give one vector of scores with all queries."""
    lanes, group = of_keys.lanes, len(queries)
    together = max(lanes // (1 << (group - 1).bit_length()), 1)

    def sums_of(key, queries: list) -> list:
        """Return, for each query, a vector whose lanes add up to its product with the key."""
        sums = [splat(FLOAT, lanes, 0.0)] * len(queries)
        for start in range(0, channels, lanes):
            k = of_keys.load(b, key, number(start), lanes)
            xs = [b.load_vector(b.address(query, 4 * start), FLOAT, lanes) for query in queries]
            sums = [b.fused(k, x, one) for x, one in zip(xs, sums, strict=True)]
        return sums

    def of_keys_from(first, count: int):
        keys = [b.address(key, (b.address(first, i), key_token)) for i in range(count)]
        for start in range(0, group, lanes // count):
            some = slice(start, start + lanes // count)
            by_query = zip(*(sums_of(one, queries[some]) for one in keys), strict=True)
            sums = [one for of_query in by_query for one in of_query]
            padding = [splat(FLOAT, lanes, 0.0)] * (lanes - len(sums))
            totals = b.fmul(b.totals(sums + padding), scaling)
            for g, place in enumerate(scores[some]):
                b.store_vector(
                    b.spread(totals, count, lambda lane, g=g: g * count + lane), b.address(place, (first, 4))
                )

    whole = b.sdiv(tokens, number(together))
    b.repeat(whole, lambda i, _: of_keys_from(b.mul(i, number(together)), together))
    done = b.mul(whole, number(together))
    b.repeat(b.sub(tokens, done), lambda i, _: of_keys_from(b.add(done, i), 1))


def emit_softmax(b: Builder, scores, mask, vectors, lanes: int):
    """Emit the weights e ** (score - highest) in place of a query's scores; return 1 / their sum, or 0 if that is 0."""

    def find_highest(i, carried):
        place = b.address(scores, (i, 4 * lanes))
        score = b.load_vector(place, FLOAT, lanes)
        if mask is not None:
            score = b.fadd(score, b.load_vector(b.address(mask, (i, 4 * lanes)), FLOAT, lanes))
            b.store_vector(score, place)
        return [b.select(b.fcmp_ordered(">", score, carried[0]), score, carried[0])]

    [highest] = b.repeat(vectors, find_highest, [splat(FLOAT, lanes, LOWEST)])
    maximum = b.intrinsic(f"llvm.vector.reduce.fmax.v{lanes}f32", FLOAT, [highest.type])
    highest = b.everywhere(b.call(maximum, [highest]), lanes)

    def weigh(i, carried):
        place = b.address(scores, (i, 4 * lanes))
        weight = exponential(b, b.fsub(b.load_vector(place, FLOAT, lanes), highest))
        b.store_vector(weight, place)
        return [b.fadd(carried[0], weight)]

    total = b.total(b.repeat(vectors, weigh, [splat(FLOAT, lanes, 0.0)])[0])
    inverse = b.fdiv(FLOAT(1.0), total)
    return b.everywhere(b.select(b.fcmp_ordered("==", total, FLOAT(0.0)), FLOAT(0.0), inverse), lanes)


def exponential(b: Builder, x):
    """Return e ** x for x <= 0, as 2 ** n * e ** r, |r| < 0.35; e ** r is a power series."""
    log2_e, rounding, one, small, zero, *series = (
        splat(FLOAT, x.type.count, value)
        for value in (LOG2_E, ROUNDING, -LN_2[0], SMALLEST_EXPONENT, 0.0, *INVERSE_FACTORIALS)
    )
    rounded = b.fused(x, log2_e, rounding)
    n = b.fsub(rounded, rounding)
    r = b.fused(n, splat(FLOAT, x.type.count, -LN_2[1]), b.fused(n, one, x))
    result = functools.reduce(lambda sum, factor: b.fused(sum, r, factor), series)
    bits = vector(INT32, x.type.count)
    exponent = b.shl(b.bitcast(rounded, bits), splat(INT32, x.type.count, 23))
    power = b.bitcast(b.add(exponent, splat(INT32, x.type.count, 127 << 23)), x.type)
    return b.select(b.fcmp_ordered("<", x, small), zero, b.fmul(result, power))


def emit_sums(
    b: Builder,
    of_values: Plain,
    weights: list,
    value,
    value_token,
    tokens,
    factors: list,
    ys: list,
    channels: int,
    registers: int,
):
    """Emit each query's weighted sum of a head's values, for as many channels at a time as registers hold."""
    lanes, group = of_values.lanes, len(weights)
    together = lanes * max((registers - 1) // (group + 1), 1)
    for first in range(0, channels, together):
        starts = range(first, min(first + together, channels), lanes)

        def of_token(token, sums, starts=starts):
            row = b.address(value, (token, value_token))
            parts = [of_values.load(b, row, number(start), lanes) for start in starts]
            places = [b.inttoptr(b.address(one, (token, 4)), FLOAT.as_pointer()) for one in weights]
            each = [b.everywhere(b.load(place), lanes) for place in places]
            terms = [(weight, part) for weight in each for part in parts]
            return [b.fused(*term, one) for term, one in zip(terms, sums, strict=True)]

        sums = b.repeat(tokens, of_token, [splat(FLOAT, lanes, 0.0)] * group * len(starts))
        places = [(b.address(y, 4 * start), factor) for y, factor in zip(ys, factors, strict=True) for start in starts]
        for one, (place, factor) in zip(sums, places, strict=True):
            b.store_vector(b.fmul(one, factor), place)

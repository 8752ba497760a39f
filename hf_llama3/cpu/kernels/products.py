"""Machine code for products of rows with a weight, which is read where it lies in memory.

The product with one row is bound by memory: every output feature is read once, from start to end. With several rows a
tile is computed at a time: some output features times some rows, with all sums in registers.

A quantised weight is stored in blocks of 128 inputs: 16 lanes of 8 levels. Neighbouring lanes share a scale: 8 lanes
(64 inputs) for 8 bits, 4 lanes (32 inputs) for 4 bits. For 8 bits, level k of lane j belongs to input 16 k + j of the
block; for 4 bits, to input 32 (j // 4) + 4 k + j % 4, so that inputs that share a scale are neighbours. Rows that are
multiplied by levels, and weights that are dequantised, are in that order, too.
"""

import functools
from collections.abc import Callable

from .. import processor
from .machine_code import FLOAT, HALF, INT8, INT16, INT32, Builder, MachineCode, number, splat, vector

BLOCK = 128  # inputs
LANES = 16  # of a block
LEVELS = BLOCK // LANES  # of a lane
NARROW = 8  # lanes
GROUPS = {"int8": 2, "int4": 4}  # of a block, each with a scale of its own
OFFSET = 128.0  # a bfloat16 whose last 4 bits are 0 and count ones: a 4-bit level written there is added
OFFSET_BITS = 0x4300
ARGUMENTS = (
    *("weight", "weight_row", "scale", "scale_row"),  # addresses; strides of output features in bytes
    *("x", "x_row", "sums", "sums_row", "y", "y_row"),  # the same for rows
    *("outputs", "inputs", "row_tiles"),
)


class Plain:
    """Rows of float32, float16 or bfloat16."""

    def __init__(self, dtype: str, lanes: int):
        self.dtype, self.lanes = dtype, lanes
        self.size = 4 if dtype == "float32" else 2  # bytes of a number

    def load(self, b: Builder, row, start, lanes: int):
        """Return neighbouring numbers as a vector of float32."""
        address = b.address(row, (start, self.size))
        if self.dtype == "float32":
            return b.load_vector(address, FLOAT, lanes)
        if self.dtype == "float16":
            return b.fpext(b.load_vector(address, HALF, lanes), vector(FLOAT, lanes))
        return b.widen_bfloat16(b.load_vector(address, INT16, lanes))


class Pairs(Plain):
    """Rows of bfloat16 that an instruction multiplies in pairs (AVX512_BF16)."""

    def __init__(self):
        super().__init__("bfloat16", lanes=32)


class Quantised:
    """Rows of levels of 8 or 4 bits, with scales and, for 4 bits, minimums (the value of level 0)."""

    def __init__(self, kind: str, lanes: int):
        self.kind, self.lanes, self.groups = kind, min(lanes, LANES), GROUPS[kind]
        self.has_minimum = kind == "int4"
        self.size = BLOCK if kind == "int8" else BLOCK // 2  # bytes of a block
        self.pieces = range(LANES // self.lanes)  # of a block, where a vector has fewer lanes

    def levels(self, b: Builder, row, block, piece: int, masked: bool = False) -> list:
        """Return a piece's 8 vectors of levels as float32; `masked`: level k of 4 bits times 16 ** k."""
        start, lanes = b.address(row, (block, self.size)), self.lanes
        if self.kind == "int8":
            parts = [b.load_vector(b.address(start, LANES * k + lanes * piece), INT8, lanes) for k in range(LEVELS)]
            return [b.sitofp(b.sext(part, vector(INT32, lanes)), vector(FLOAT, lanes)) for part in parts]
        whole, levels = b.load_vector(b.address(start, 4 * lanes * piece), INT32, lanes), []
        for k in range(LEVELS):
            if masked and k < LEVELS - 1:
                level = b.and_(whole, splat(INT32, lanes, 15 << 4 * k))
            else:  # the last reaches the sign bit, so it is always shifted
                level = b.and_(b.lshr(whole, splat(INT32, lanes, 4 * k)), splat(INT32, lanes, 15))
            levels.append(b.sitofp(level, vector(FLOAT, lanes)))
        return levels

    def pairs(self, b: Builder, row, block) -> list:
        """Return a block's levels as pairs (k, k + 4) of bfloat16, k = 0 to 3; levels of 4 bits with `OFFSET` added."""
        low, high = splat(INT32, LANES, 16), splat(INT32, LANES, 0xFFFF0000)
        if self.kind == "int8":  # the float32 of an 8-bit integer is a bfloat16 followed by 16 zeros
            levels = [b.bitcast(level, vector(INT32, LANES)) for level in self.levels(b, row, block, 0)]
            return [b.or_(b.lshr(levels[k], low), b.and_(levels[k + 4], high)) for k in range(4)]
        whole = b.load_vector(b.address(row, (block, self.size)), INT32, LANES)
        shifted = [b.lshr(whole, splat(INT32, LANES, 4 * k)) for k in range(4)]
        offset = splat(INT32, LANES, OFFSET_BITS * 0x10001)
        return [b.or_(b.and_(one, splat(INT32, LANES, 0x000F000F)), offset) for one in shifted]

    def scales(self, b: Builder, row, block, piece: int) -> tuple:
        """Return the scales of a piece's lanes, and the minimums beside them (None for 8 bits)."""
        element = INT32 if self.has_minimum else INT16
        bits = b.load_vector(b.address(row, (block, element.width // 8 * self.groups)), element, self.groups)
        if not self.has_minimum:
            bits = b.zext(bits, vector(INT32, self.groups))
        together = LANES // self.groups
        bits = b.spread(bits, self.lanes, lambda lane: (piece * self.lanes + lane) // together)
        halves = b.shl(bits, splat(INT32, self.lanes, 16)), b.and_(bits, splat(INT32, self.lanes, 0xFFFF0000))
        scale, minimum = (b.bitcast(half, vector(FLOAT, self.lanes)) for half in halves)
        return scale, minimum if self.has_minimum else None


def dot(b: Builder, weights: list, xs: list, inputs, of_weights: Plain, of_xs: Plain) -> list:
    """Emit the products of each output feature with each row; return them in this order."""
    lanes, count = of_weights.lanes, len(weights) * len(xs)
    unrolled = max(4 // count, 1)  # independent sums, which the processor adds at once
    pairs = isinstance(of_weights, Pairs)

    def terms(start, width: int, sums):
        if pairs and width > 1:
            sides = (
                [b.load_vector(b.address(row, (start, 2)), INT32, width // 2) for row in side] for side in (weights, xs)
            )
            multiply = functools.partial(pair_products, b)
        else:
            sides = (
                [of.load(b, row, start, width) for row in side] for of, side in ((of_weights, weights), (of_xs, xs))
            )
            multiply = b.fused
        w, x = sides
        return [multiply(one, other, sums[r * len(x) + c]) for r, one in enumerate(w) for c, other in enumerate(x)]

    def vectors(index, sums):
        starts = [b.address((b.address((index, unrolled), u), lanes)) for u in range(unrolled)]
        return [one for u, start in enumerate(starts) for one in terms(start, lanes, sums[u * count :][:count])]

    whole = b.sdiv(inputs, number(lanes * unrolled))
    zero = splat(FLOAT, lanes // 2 if pairs else lanes, 0.0)
    sums = b.repeat(whole, vectors, [zero] * count * unrolled)
    sums = [functools.reduce(b.fadd, sums[which::count]) for which in range(count)]
    done = b.mul(whole, number(lanes * unrolled))
    last = b.repeat(b.sub(inputs, done), lambda i, sums: terms(b.add(done, i), 1, sums), [splat(FLOAT, 1, 0.0)] * count)
    return [b.fadd(b.total(one), b.total(other)) for one, other in zip(sums, last, strict=True)]


def pair_products(b: Builder, one, other, sums):
    """Add both products of the pairs of bfloat16 to each lane."""
    pairs, result = vector(INT32, 16), vector(FLOAT, 16)
    return b.call(b.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", result, [result, pairs, pairs]), [sums, one, other])


def quantised_dot(b: Builder, weights: Quantised, a: dict, outputs: list, rows: list, in_pairs: bool) -> list:
    """Emit the products of each output feature with each row; return them in this order (`inputs` counts blocks)."""
    of_levels = [b.address(a["weight"], (output, a["weight_row"])) for output in outputs]
    of_scales = [b.address(a["scale"], (output, a["scale_row"])) for output in outputs]
    xs, sums_of_xs = ([b.address(a[name], (row, a[f"{name}_row"])) for row in rows] for name in ("x", "sums"))
    lanes, zero = weights.lanes, splat(FLOAT, weights.lanes, 0.0)

    def sums_of_block(block, piece: int) -> list:
        """Return the sums of levels times inputs, lane by lane, for a piece of a block."""
        if in_pairs:
            levels, multiply = [weights.pairs(b, row, block) for row in of_levels], functools.partial(pair_products, b)
        else:
            levels, multiply = [weights.levels(b, row, block, piece, masked=True) for row in of_levels], b.fused
        size, element = (2, INT32) if in_pairs else (4, FLOAT)
        chains = 2 if len(outputs) * len(rows) == 1 and lanes < LANES else 1  # one chain would wait for itself
        sums = [[zero] * len(outputs) * len(rows) for _ in range(chains)]
        for k in range(len(levels[0])):
            at = 4 * (LANES * k + lanes * piece)
            x = [b.load_vector(b.address(row, (block, size * BLOCK), at), element, lanes) for row in xs]
            chain = sums[k % chains]
            sums[k % chains] = [
                multiply(level[k], one, chain[r * len(x) + c])
                for r, level in enumerate(levels)
                for c, one in enumerate(x)
            ]
        return [functools.reduce(b.fadd, chains) for chains in zip(*sums, strict=True)]

    def of_block(block, totals):
        totals = list(totals)
        for piece in weights.pieces:
            sums, at = sums_of_block(block, piece), 4 * lanes * piece
            for r, row in enumerate(of_scales):
                scale, minimum = weights.scales(b, row, block, piece)
                if weights.has_minimum and in_pairs:
                    minimum = b.fused(scale, splat(FLOAT, lanes, -OFFSET), minimum)
                for c, of_x in enumerate(sums_of_xs):
                    which = r * len(rows) + c
                    totals[which] = b.fused(scale, sums[which], totals[which])
                    if weights.has_minimum:
                        of_group = b.load_vector(b.address(of_x, (block, 4 * LANES), at), FLOAT, lanes)
                        totals[which] = b.fused(minimum, of_group, totals[which])
        return totals

    return [b.total(total) for total in b.repeat(a["inputs"], of_block, [zero] * len(outputs) * len(rows))]


def dequantise(b: Builder, weights: Quantised, a: dict, output, target, rounded: Callable | None):
    """Emit code that dequantises an output feature into memory, as float32 or rounded by `rounded`."""
    size = 4 if rounded is None else 2
    levels = b.address(a["weight"], (output, a["weight_row"]))
    scales = b.address(a["scale"], (output, a["scale_row"]))

    def of_block(block, _):
        for piece in weights.pieces:
            scale, minimum = weights.scales(b, scales, block, piece)
            minimum = minimum or splat(FLOAT, weights.lanes, 0.0)
            for k, level in enumerate(weights.levels(b, levels, block, piece)):
                value = b.fused(level, scale, minimum)
                place = b.address(target, (block, size * BLOCK), size * (LANES * k + weights.lanes * piece))
                b.store_vector(value if rounded is None else rounded(b, value), place)

    b.repeat(a["inputs"], of_block)


def round_to_bfloat16(b: Builder, value):
    """Round finite float32 to the bits of the nearest bfloat16, ties to even."""
    lanes = value.type.count
    bits = b.bitcast(value, vector(INT32, lanes))
    is_odd = b.and_(b.lshr(bits, splat(INT32, lanes, 16)), splat(INT32, lanes, 1))
    rounded = b.add(b.add(bits, splat(INT32, lanes, 0x7FFF)), is_odd)
    return b.trunc(b.lshr(rounded, splat(INT32, lanes, 16)), vector(INT16, lanes))


def round_at_once(b: Builder, value):
    """Do the same by an instruction (AVX512_BF16), which flushes numbers below 2 ** -126 to 0."""
    name, result = "llvm.x86.avx512bf16.cvtneps2bf16.512", vector(INT16, 16)
    return b.call(b.intrinsic(name, result, [value.type]), [value])


def share(b: Builder, count, part, parts) -> tuple:
    """Return the first and the last (excluded) item of a part, where `parts` share `count` items."""
    first, last = (b.sdiv(b.mul(count, one), parts) for one in (part, b.add(part, number(1))))
    return first, last


def emit_product(weights: Plain | Quantised, of_x: Plain, outputs_together: int, rows_together: int):
    """Return the emitter of the products of all output features with tiles of rows."""

    def emit(b: Builder, a: dict, part, parts):
        def of_outputs(first, count: int):
            outputs = [b.address(first, r) for r in range(count)]

            def tile(index, _):
                rows = [b.address((index, rows_together), c) for c in range(rows_together)]
                if isinstance(weights, Quantised):
                    results = quantised_dot(b, weights, a, outputs, rows, isinstance(of_x, Pairs))
                else:
                    of_weights = [b.address(a["weight"], (output, a["weight_row"])) for output in outputs]
                    xs = [b.address(a["x"], (row, a["x_row"])) for row in rows]
                    results = dot(b, of_weights, xs, a["inputs"], weights, of_x)
                places = [b.address(a["y"], (row, a["y_row"]), (output, 4)) for output in outputs for row in rows]
                for result, place in zip(results, places, strict=True):
                    b.store(result, b.inttoptr(place, FLOAT.as_pointer()))

            b.repeat(a["row_tiles"], tile)

        whole = b.sdiv(a["outputs"], number(outputs_together))
        first, last = share(b, whole, part, parts)
        together = outputs_together
        b.repeat(b.sub(last, first), lambda i, _: of_outputs(b.address((b.add(first, i), together)), together))
        if together > 1:
            done = b.mul(whole, number(together))
            is_last = b.icmp_signed("==", b.add(part, number(1)), parts)
            rest = b.select(is_last, b.sub(a["outputs"], done), number(0))
            b.repeat(rest, lambda i, _: of_outputs(b.add(done, i), 1))

    return emit


def emit_dequantisation(weights: Quantised, rounded: Callable | None):
    """Return the emitter that dequantises all output features into the rows of `y`."""

    def emit(b: Builder, a: dict, part, parts):
        first, last = share(b, a["outputs"], part, parts)

        def of_output(index, _):
            output = b.add(first, index)
            dequantise(b, weights, a, output, b.address(a["y"], (output, a["y_row"])), rounded)

        b.repeat(b.sub(last, first), of_output)

    return emit


def compiled(name: str, emit: Callable) -> Callable:
    """Compile an emitter; the function takes `ARGUMENTS` by name, 0 for those that are missing."""
    code = MachineCode(
        name, len(ARGUMENTS), lambda b, values, *of: emit(b, dict(zip(ARGUMENTS, values, strict=True)), *of)
    )

    def run(parts: int, **arguments: int):
        code(*(arguments.get(name, 0) for name in ARGUMENTS), parts=parts)

    return run


@functools.cache
def product(kind: str, rows_together: int, in_pairs: bool, here: processor.Processor) -> Callable:
    """Compile the product of rows with a weight of "float32", "float16", "bfloat16", "int8" or "int4".

    Rows are float32, or bfloat16 where `in_pairs`; outputs are float32.
    """
    of_x = Pairs() if in_pairs else Plain("float32", here.lanes)
    if kind in GROUPS:
        return compiled("product", emit_product(Quantised(kind, here.lanes), of_x, 1, rows_together))
    if rows_together == 1:  # narrow vectors are a third faster on AVX-512
        weights = Pairs() if in_pairs else Plain(kind, NARROW)
        return compiled("product", emit_product(weights, of_x, 1, 1))
    weights = Pairs() if in_pairs else Plain(kind, here.lanes)
    together = max(here.registers // 2 // rows_together, 1)  # so that all sums fit into registers
    return compiled("product", emit_product(weights, of_x, together, rows_together))


@functools.cache
def dequantisation(kind: str, to: str, here: processor.Processor) -> Callable:
    """Compile the dequantisation of a weight of "int8" or "int4" to float32 or bfloat16."""
    rounded = round_at_once if here.multiplies_pairs else round_to_bfloat16
    weights = Quantised(kind, here.lanes)
    return compiled("dequantise", emit_dequantisation(weights, rounded if to == "bfloat16" else None))

"""Machine code that quantises weights to levels of 8 or 4 bits, in the blocks that `products` describes.

8 bits: the weight of largest magnitude in a group becomes level 127 or -127. 4 bits: levels are spread evenly from a
group's smallest weight to its largest, or over a slightly narrower range, and then fitted to the weights by least
squares; of the ranges tried, the one with the least error is kept. All lanes of a block are computed at once.
"""

# Shapes: O output features, B blocks of 128 inputs, G groups of a block

import functools
from collections.abc import Callable

from llvmlite import ir

from .. import processor
from .machine_code import FLOAT, INT8, INT32, Builder, number, splat, vector
from .products import BLOCK, GROUPS, LANES, LEVELS, Plain, compiled, round_to_bfloat16, share

WIDTHS = 2  # ranges that are tried, each narrower than the one before by this share:
NARROWER = 0.08
TURNS = 3  # of the least-squares fit
LEAST = 2.0**-100  # the smallest scale, for a group of zeros


class Groups:
    """Operations on the groups of a vector's lanes: `together` neighbours share a scale."""

    def __init__(self, b: Builder, lanes: int, together: int):
        self.b, self.lanes, self.together = b, lanes, together

    def all(self, value, join: Callable):
        """Return, in every lane, the reduction of its group by `join`."""
        step = 1
        while step < self.together:
            value = join(value, self.b.spread(value, self.lanes, lambda lane, step=step: lane ^ step))
            step *= 2
        return value

    def sum(self, values: list):
        return self.all(functools.reduce(self.b.fadd, values), self.b.fadd)

    def pick(self, value):
        """Return the first lane of every group."""
        return self.b.spread(value, self.lanes // self.together, lambda group: group * self.together)

    def of(self, number_: float):
        return splat(FLOAT, self.lanes, number_)

    def larger(self, one, other):
        return self.b.select(self.b.fcmp_ordered(">", one, other), one, other)

    def smaller(self, one, other):
        return self.b.select(self.b.fcmp_ordered("<", one, other), one, other)

    def nearest(self, value, low: float, high: float):
        """Round to integers, and clamp to a range."""
        name, kind = f"llvm.rint.v{self.lanes}f32", value.type
        whole = self.b.call(self.b.intrinsic(name, kind, [kind]), [value])
        return self.smaller(self.larger(whole, self.of(low)), self.of(high))

    def bfloat16(self, value):
        """Round to bfloat16; return its bits and its value as float32."""
        bits = round_to_bfloat16(self.b, value)
        return bits, self.b.widen_bfloat16(bits)


def to_int8(b: Builder, g: Groups, weights: list) -> tuple:
    """Return the levels of 8 bits and the bits of the scale in every lane."""
    sizes = [b.and_(b.bitcast(one, vector(INT32, g.lanes)), splat(INT32, g.lanes, 0x7FFFFFFF)) for one in weights]

    def larger(one, other):  # positive floats keep their order when read as integers, and NaN is the largest
        return b.select(b.icmp_signed(">", one, other), one, other)

    largest = b.bitcast(g.all(functools.reduce(larger, sizes), larger), vector(FLOAT, g.lanes))
    wanted = b.fmul(largest, g.of(1 / 127))
    bits, scale = g.bfloat16(b.select(b.fcmp_ordered("<", wanted, g.of(LEAST)), g.of(LEAST), wanted))
    per_unit = b.fdiv(g.of(1.0), scale)
    levels = [g.nearest(b.fmul(one, per_unit), -127.0, 127.0) for one in weights]
    return [b.trunc(b.fptosi(one, vector(INT32, g.lanes)), vector(INT8, g.lanes)) for one in levels], bits


def to_int4(b: Builder, g: Groups, weights: list) -> tuple:
    """Return the levels of 4 bits, and the bits of the scale and the minimum in every lane."""
    count = g.of(1 / (LEVELS * g.together))
    low = g.all(functools.reduce(g.smaller, weights), g.smaller)
    high = g.all(functools.reduce(g.larger, weights), g.larger)
    range_, middle = b.fsub(high, low), b.fmul(b.fadd(high, low), g.of(0.5))
    sum_of_weights = g.sum(weights)

    def levels_of(scale, minimum) -> list:
        per_unit = b.fdiv(g.of(1.0), scale)
        return [g.nearest(b.fmul(b.fsub(one, minimum), per_unit), 0.0, 15.0) for one in weights]

    def fitted(scale, minimum) -> tuple:
        """Return the scale and minimum that fit the current levels to the weights by least squares."""
        levels = levels_of(scale, minimum)
        of_levels, squares = g.sum(levels), g.sum([b.fmul(one, one) for one in levels])
        products = g.sum([b.fmul(level, weight) for level, weight in zip(levels, weights, strict=True)])
        mean = b.fmul(of_levels, count)
        spread = b.fsub(squares, b.fmul(of_levels, mean))
        slope = b.fdiv(b.fsub(products, b.fmul(sum_of_weights, mean)), spread)
        is_one = b.and_(b.fcmp_ordered(">", spread, g.of(0.5)), b.fcmp_ordered(">", slope, g.of(LEAST)))
        scale = b.select(is_one, slope, scale)
        return scale, b.fsub(b.fmul(sum_of_weights, count), b.fmul(scale, mean))

    def try_width(index, best):
        lanes = vector(FLOAT, g.lanes)
        nth = b.uitofp(index, FLOAT)
        width = b.fsub(ir.Constant(FLOAT, 1 / 15), b.fmul(nth, ir.Constant(FLOAT, NARROWER / 15)))
        width = b.shuffle_vector(
            b.insert_element(ir.Constant(lanes, ir.Undefined), width, ir.Constant(INT32, 0)),
            ir.Constant(lanes, ir.Undefined),
            splat(INT32, g.lanes, 0),
        )
        scale = g.larger(b.fmul(range_, width), g.of(LEAST))
        minimum = b.fsub(middle, b.fmul(scale, g.of(7.5)))
        for _ in range(TURNS):
            scale, minimum = fitted(scale, minimum)
        scale, minimum = (g.bfloat16(one)[1] for one in (scale, minimum))
        made = [b.fused(level, scale, minimum) for level in levels_of(scale, minimum)]
        off = [b.fsub(one, weight) for one, weight in zip(made, weights, strict=True)]
        error = g.sum([b.fmul(one, one) for one in off])
        is_better = b.fcmp_ordered("<", error, best[0])
        return [b.select(is_better, new, old) for new, old in zip((error, scale, minimum), best, strict=True)]

    # For a group with NaN or infinity no error is smaller: its scale stays infinite, which `quantise` looks for
    infinite = g.of(float("inf"))
    _, scale, minimum = b.repeat(number(WIDTHS), try_width, [infinite, infinite, low])
    minimum = b.select(b.fcmp_ordered(">", range_, g.of(0.0)), minimum, g.bfloat16(low)[1])  # of a group of zeros: 0
    levels = [b.fptosi(one, vector(INT32, g.lanes)) for one in levels_of(scale, minimum)]
    words = functools.reduce(b.or_, (b.shl(one, splat(INT32, g.lanes, 4 * k)) for k, one in enumerate(levels)))
    scale, minimum = (b.bitcast(one, vector(INT32, g.lanes)) for one in (scale, minimum))
    return words, b.or_(b.lshr(scale, splat(INT32, g.lanes, 16)), minimum)


def neighbours(b: Builder, source: Plain, row, block, k: int, first: int, lanes: int):
    """Return the weights whose level is k, for some lanes; 4 lanes hold 32 neighbouring inputs."""
    groups = range(first // 4, (first + lanes) // 4)
    parts = [source.load(b, row, b.address((block, BLOCK), 32 * group + 4 * k), 4) for group in groups]
    while len(parts) > 1:
        parts = [b.join(*parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return parts[0]


def emit_quantisation(kind: str, source: Plain):
    """Return the emitter that quantises all output features of a plain weight of `inputs` blocks into `y`."""
    groups, size = GROUPS[kind], BLOCK if kind == "int8" else BLOCK // 2
    lanes = min(source.lanes, LANES)

    def emit(b: Builder, a: dict, part, parts):
        g = Groups(b, lanes, LANES // groups)
        first, last = share(b, a["outputs"], part, parts)

        def of_output(index, _):
            output = b.add(first, index)
            row, scales, target = (b.address(a[name], (output, a[f"{name}_row"])) for name in ("weight", "scale", "y"))

            def of_block(block, _):
                for piece in range(LANES // lanes):
                    starts = [b.address((block, BLOCK), LANES * k + lanes * piece) for k in range(LEVELS)]
                    if kind == "int8":
                        weights = [source.load(b, row, start, lanes) for start in starts]
                    else:
                        weights = [neighbours(b, source, row, block, k, piece * lanes, lanes) for k in range(LEVELS)]
                    place = b.address(
                        scales, (b.address((block, groups), piece * lanes // g.together), 2 if kind == "int8" else 4)
                    )
                    if kind == "int8":
                        levels, scale = to_int8(b, g, weights)
                        for start, level in zip(starts, levels, strict=True):
                            b.store_vector(level, b.address(target, start))
                    else:
                        words, scale = to_int4(b, g, weights)
                        b.store_vector(words, b.address(target, (block, size), 4 * lanes * piece))
                    b.store_vector(g.pick(scale), place)

            b.repeat(a["inputs"], of_block)

        b.repeat(b.sub(last, first), of_output)

    return emit


@functools.cache
def quantisation(kind: str, source: str, here: processor.Processor) -> Callable:
    """Compile the quantisation of a weight of some type to "int8" or "int4"; inputs must fill whole blocks."""
    return compiled("quantise", emit_quantisation(kind, Plain(source, here.lanes)))

"""Functions over vectors, written in LLVM's language and compiled for this processor when they are first used.

llvmlite brings the compiler; the same lines serve AVX2, AVX-512 and Arm. Addresses and counts are 64-bit integers.
(llvmlite.readthedocs.io, "IR layer"; llvm.org/docs/LangRef.html)
"""

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor

import llvmlite.binding as llvm
from llvmlite import ir

from .. import processor

FLOAT, HALF = ir.FloatType(), ir.HalfType()
INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
# The processor that code is compiled for where a wider one is held to fewer instructions
HELD = {"avx512_bf16": "cooperlake", "avx512_f": "skylake-avx512", "avx2": "haswell"}


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def splat(element: ir.Type, lanes: int, value) -> ir.Constant:
    """Return a vector of one number in every lane."""
    return ir.Constant(vector(element, lanes), [value] * lanes)


def number(value: int) -> ir.Constant:
    return ir.Constant(INT64, value)


class Builder(ir.IRBuilder):
    """An IRBuilder with the operations that products are written in."""

    def address(self, *terms):
        """Add addresses and offsets; an offset may be a pair, to be multiplied."""
        terms = [self.mul(*map(constant, term)) if isinstance(term, tuple) else constant(term) for term in terms]
        return functools.reduce(self.add, terms)

    def load_vector(self, address, element: ir.Type, lanes: int):
        pointer = self.inttoptr(address, vector(element, lanes).as_pointer())
        loaded = self.load(pointer)
        loaded.align = 1  # rows begin anywhere
        return loaded

    def store_vector(self, value, address):
        self.store(value, self.inttoptr(address, value.type.as_pointer())).align = 1

    def fused(self, a, b, c):
        """Return a * b + c, rounded once."""
        return self.call(self.intrinsic(f"llvm.fma.v{a.type.count}f32", a.type, [a.type] * 3), [a, b, c])

    def total(self, value):
        """Return the sum of a vector's lanes."""
        name = f"llvm.vector.reduce.fadd.v{value.type.count}f32"
        add = self.intrinsic(name, FLOAT, [FLOAT, value.type])
        return self.call(add, [ir.Constant(FLOAT, 0.0), value], fastmath=("reassoc",))

    def totals(self, values: list):
        """Return a vector whose lane i is the sum of vector i's lanes; there are as many vectors as lanes."""
        lanes, width = len(values), len(values)
        while width > 1:  # lanes that hold parts of the same sum
            width //= 2
            half = len(values) // 2
            is_second = [lane // width % 2 for lane in range(lanes)]
            own = [lane + lanes * second for lane, second in enumerate(is_second)]
            other = [lane + (lanes - width if second else width) for lane, second in enumerate(is_second)]
            own, other = (ir.Constant(vector(INT32, lanes), picked) for picked in (own, other))
            pairs = zip(values[:half], values[half:], strict=True)
            values = [self.fadd(self.shuffle_vector(*pair, own), self.shuffle_vector(*pair, other)) for pair in pairs]
        return values[0]

    def everywhere(self, value, lanes: int):
        """Return a vector of a scalar in every lane."""
        undefined = ir.Constant(vector(value.type, lanes), ir.Undefined)
        return self.spread(self.insert_element(undefined, value, ir.Constant(INT32, 0)), lanes, lambda lane: 0)

    def intrinsic(self, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
        if name in self.module.globals:
            return self.module.globals[name]
        return ir.Function(self.module, ir.FunctionType(result, arguments), name)

    def spread(self, value, lanes: int, pick):
        """Return a vector of `lanes` lanes; lane j is lane `pick(j)` of the given vector."""
        indices = ir.Constant(vector(INT32, lanes), [pick(lane) for lane in range(lanes)])
        return self.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), indices)

    def join(self, one, other):
        """Return the concatenation of two vectors."""
        indices = ir.Constant(vector(INT32, 2 * one.type.count), list(range(2 * one.type.count)))
        return self.shuffle_vector(one, other, indices)

    def widen_bfloat16(self, bits):
        """Return bfloat16 numbers, given as 16-bit integers, as float32."""
        lanes = bits.type.count
        shifted = self.shl(self.zext(bits, vector(INT32, lanes)), splat(INT32, lanes, 16))
        return self.bitcast(shifted, vector(FLOAT, lanes))

    def repeat(self, count, body, carried=()):
        """Emit `for i in range(count): carried = body(i, carried)`; return the last `carried`."""
        before, loop, after = self.block, self.append_basic_block("loop"), self.append_basic_block("after")
        self.cbranch(self.icmp_signed(">", count, number(0)), loop, after)
        self.position_at_end(loop)
        index, entering = self.phi(INT64), [self.phi(value.type) for value in carried]
        left = list(body(index, entering) or ())
        following, end = self.add(index, number(1)), self.block
        for phi, first, later in [(index, number(0), following), *zip(entering, carried, left, strict=True)]:
            phi.add_incoming(first, before)
            phi.add_incoming(later, end)
        self.cbranch(self.icmp_signed("<", following, count), loop, after)
        self.position_at_end(after)
        leaving = [self.phi(value.type) for value in carried]
        for phi, first, later in zip(leaving, carried, left, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(later, end)
        return leaving


def constant(value):
    return number(value) if isinstance(value, int) else value


class MachineCode:
    """A compiled `emit(builder, arguments, part, parts)`; `parts` threads share the work, one call each."""

    def __init__(self, name: str, num_arguments: int, emit):
        module = ir.Module(name)
        array = INT64.as_pointer()
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [array, INT64, INT64]), name)
        builder = Builder(function.append_basic_block("entry"))
        pointer, part, parts = function.args
        arguments = [builder.load(builder.gep(pointer, [number(i)])) for i in range(num_arguments)]
        emit(builder, arguments, part, parts)
        builder.ret_void()
        if openmp() is not None:
            team = ir.Function(module, ir.FunctionType(ir.VoidType(), [array]), "team")
            builder = Builder(team.append_basic_block("entry"))
            names = ("omp_get_thread_num", "omp_get_num_threads")
            which, of = (builder.sext(builder.call(builder.intrinsic(one, INT32, []), []), INT64) for one in names)
            builder.call(function, [team.args[0], which, of])
            builder.ret_void()
        self.engine = compile_module(module)
        signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        self.function = signature(self.engine.get_function_address(name))
        self.team = self.engine.get_function_address("team") if openmp() is not None else None
        self.array = ctypes.c_int64 * num_arguments

    def __call__(self, *arguments: int, parts: int = 1):
        """Run with these addresses and counts; return when all parts are done."""
        array = self.array(*arguments)
        address = ctypes.addressof(array)
        if parts == 1:
            self.function(address, 0, 1)
        elif self.team is not None:
            openmp()(ctypes.c_void_p(self.team), ctypes.c_void_p(address), parts, 0)
        else:
            others = [pool().submit(self.function, address, part, parts) for part in range(1, parts)]
            self.function(address, 0, parts)
            for other in others:
                other.result()


def compile_module(module: ir.Module):
    """Compile for this processor, or for the one that it is held to."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    parsed = llvm.parse_assembly(str(module))
    machine = target_machine()
    parsed.triple = machine.triple
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = False  # the code is vectorised by hand
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine


def target_machine() -> llvm.TargetMachine:
    here = processor.here()
    target = llvm.Target.from_default_triple()
    if here.is_held:
        name = next((name for has, name in HELD.items() if has in here.instructions), "x86-64")
        return target.create_target_machine(cpu=name, opt=3, jit=True)
    features = llvm.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True)


@functools.cache
def openmp():
    """Return the function that runs torch's own team of threads (libgomp's ABI); None without libgomp."""
    try:
        run = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError, TypeError):  # macOS, Windows
        return None
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        llvm.add_symbol(name, ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value)
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return run


@functools.cache
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(processor.cores())

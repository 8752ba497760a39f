"""Generation against upstream and llama.cpp, every contender in a process of its own, in one interleaved run.

    pip install llama-cpp-python gguf   # for llama.cpp; without them it is left out (`kernels` takes numba, if there)
    OMP_NUM_THREADS=1 python benchmarks/generation.py --layers 4
    OMP_NUM_THREADS=1 python benchmarks/generation.py --layers 16 --contexts 64 2048 8192 --batches 1 4 16
    OMP_NUM_THREADS=1 python benchmarks/generation.py starts --layers 16
    OMP_NUM_THREADS=1 python benchmarks/generation.py kernels --batches 1 4 16 64 512
    OMP_NUM_THREADS=1 python benchmarks/generation.py products --batches 1 16
    python benchmarks/generation.py --device cuda --geometry 8B --layers 32 --batches 1 4 16 64   # with torchao

Random bfloat16 weights are written once, as a Hugging Face folder and as GGUF files. Then all contenders start, and are
asked in turn, round after round. A step's share is what reading its weights once comes to of the speed at which this
machine reads memory (a GPU: copies it). Medians; ratios come last. `starts` times new processes to their first token;
`kernels` matrix products alone, at the batches; `products` those of a whole step beside the step.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine

GEOMETRY = {
    **{"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 16384},
    **{"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-5},
    **{"bos_token_id": 128000, "eos_token_id": None, "pad_token_id": 0},
}
SIZES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128, "tie_word_embeddings": False},
}
CONTENDERS = {
    "upstream": {},
    "upstream, static and compiled": {"stock": True},
    "ours, plain": {},
    "ours, optimize": {"optimize": {}},
    "ours, compile": {"optimize": {"compile": True}},
    "ours, int8": {"optimize": {"quantize": "int8"}},
    "ours, int8, compile": {"optimize": {"quantize": "int8", "compile": True}},
    "ours, int4": {"optimize": {"quantize": "int4"}},
    "ours, int4, compile": {"optimize": {"quantize": "int4", "compile": True}},
    "ours, packed": {"packed": None},
    "ours, int8, packed": {"packed": "int8"},
    "ours, int4, packed": {"packed": "int4"},
    "llama.cpp bf16": {"gguf": "BF16"},
    "llama.cpp q8_0": {"gguf": "Q8_0"},
    "llama.cpp q4_0": {"gguf": "Q4_0"},
}
CONTENDERS_ON_A_GPU = {
    "upstream": {},
    "upstream, static and compiled": {"stock": True},
    "ours, compile": {"optimize": {"compile": True}},
    "ours, int8, compile": {"optimize": {"compile": True}, "torchao": {"name": "Int8WeightOnlyConfig"}},
    "ours, int4, compile": {
        "optimize": {"compile": True},
        "torchao": {"name": "Int4WeightOnlyConfig", "int4_packing_format": "tile_packed_to_4d"},  # torch's own kernel
    },
}
RATIOS = [
    ("ours, optimize", "upstream"),
    ("ours, optimize", "llama.cpp bf16"),
    ("ours, compile", "upstream"),
    ("ours, compile", "upstream, static and compiled"),
    ("ours, compile", "llama.cpp bf16"),
    ("ours, int8", "upstream"),
    ("ours, int4", "upstream"),
    ("ours, int8", "llama.cpp q8_0"),
    ("ours, int8, compile", "llama.cpp q8_0"),
    ("ours, int4", "llama.cpp q4_0"),
    ("ours, int4, compile", "llama.cpp q4_0"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", nargs="?", choices=["generate", "starts", "kernels", "products", "serve"], default="generate"
    )
    parser.add_argument("--device", default="cpu", help="cpu, or what torch calls a GPU, with contenders of its own")
    parser.add_argument("--geometry", choices=list(SIZES), default="1B")
    parser.add_argument("--layers", type=int, default=4, help="of 16 (1B) or 32 (8B)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[64], help="prompt tokens before the steps")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--prefill", type=int, default=512, help="prompt tokens of the prefill that is timed")
    parser.add_argument("--steps", type=int, default=16, help="tokens a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="names of contenders")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "serve":
        return serve(args.serve, args.folder, args.device)
    print(describe_machine(), flush=True)
    if args.part == "kernels":
        time_kernels(args)
    elif args.part == "products":
        time_products(args)
    else:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="generation-benchmark-") as folder:
            (time_starts if args.part == "starts" else compare)(args, Path(folder))


def prepare(args, folder: Path) -> dict[str, dict]:
    """Write what the contenders read, and return those that have it."""
    from hf_llama3.cpu.packing import pack_model

    write_models(folder, make_config(args), with_gguf=args.device == "cpu")
    settings = contenders_on(args.device)
    names = args.only or list(settings)
    for kind in {settings[name]["packed"] for name in names if "packed" in settings[name]}:
        pack_model(folder / "hf", folder / source({"packed": kind}), kind)
    return {name: settings[name] for name in names if (folder / source(settings[name])).exists()}


def time_starts(args, folder: Path):
    """Print how long each contender takes from a new process to its first token, in turn, round after round."""
    from hf_llama3.measure.bench import measure_read_speed

    settings, read = prepare(args, folder), measure_read_speed(args.device)
    starts = {name: [] for name in settings}
    for _ in range(args.rounds):
        for name, how in settings.items():
            worker = Worker(name, how, folder, args.device)
            starts[name].append((worker.first_token, worker.facts["loading"], worker.facts["preparing"]))
            worker.end()
    print(f"\n{args.geometry} geometry, {args.layers} layers; memory is read at {read / 1e9:.1f} GB/s\n")
    print("| | First token from cold, s | Loading, s | Optimising, s | of upstream's |\n|---|---:|---:|---:|---:|")
    medians = {name: list(map(statistics.median, zip(*runs, strict=True))) for name, runs in starts.items()}
    for name, (first, loading, preparing) in medians.items():
        ratio = f"{first / medians['upstream'][0]:.2f}" if "upstream" in medians else ""
        print(f"| {name} | {first:.1f} | {loading:.2f} | {preparing:.2f} | {ratio} |")


def compare(args, folder: Path):
    from hf_llama3.measure.bench import measure_read_speed

    workers = {name: Worker(name, how, folder, args.device) for name, how in prepare(args, folder).items()}
    names = list(workers)
    questions = [(batch, size, args.steps) for batch in args.batches for size in args.contexts]
    # Short ones first: upstream's static cache stays as long as the longest needed.
    questions = sorted([*questions, (1, args.prefill, 2)], key=lambda question: question[1])
    answers = {question: {name: [] for name in names} for question in questions}
    reads = []
    for number in range(args.rounds):
        for question in questions:
            reads.append(measure_read_speed(args.device))
            for name, worker in workers.items():
                if question[0] > 1 and name.startswith("llama.cpp"):
                    continue  # its Python binding evaluates one sequence
                print(f"round {number + 1} of {args.rounds}: {question} {name}", file=sys.stderr)
                answers[question][name].append(worker.ask(question))
    for worker in workers.values():
        worker.end()
    report(args, workers, answers, statistics.median(reads))


def report(args, workers, answers, read: float):
    where = f"{torch.get_num_threads()} thread(s)" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    print(f"\n{args.geometry} geometry, {args.layers} layers, {where}; memory is read at {read / 1e9:.1f} GB/s\n")
    print("| | Weights, GB | Peak, GB |\n|---|---:|---:|")
    for name, worker in workers.items():
        print(f"| {name} | {worker.facts['bytes'] / 1e9:.2f} | {worker.facts['peak'] / 1e9:.1f} |")
    steps = {}
    for (batch, size, new), by_name in answers.items():
        print(f"\n| batch {batch}, after {size} tokens | ms a step | share | prefill, tokens/s |\n|---|---:|---:|---:|")
        for name, runs in by_name.items():
            if runs:
                step = statistics.median(time for run in runs for time in run["steps"])
                prefill = statistics.median(run["prefill"] for run in runs)
                steps[name, batch, size, new] = step, prefill
                share = workers[name].facts["bytes"] / step / read
                print(f"| {name} | {step * 1e3:.1f} | {share:.2f} | {batch * size / prefill:.0f} |")
    print()
    for (batch, size, new), by_name in answers.items():
        for ours, theirs in RATIOS:
            if by_name.get(ours) and by_name.get(theirs):
                mine, its = steps[ours, batch, size, new], steps[theirs, batch, size, new]
                print(f"batch {batch}, {size} tokens: {ours} / {theirs}: step {mine[0] / its[0]:.2f}, "
                      f"prefill {mine[1] / its[1]:.2f}")  # fmt: skip


def make_config(args):
    from hf_llama3 import Llama3Config

    sizes = GEOMETRY | SIZES[args.geometry]
    return Llama3Config(**sizes, num_hidden_layers=args.layers, dtype="bfloat16")


def contenders_on(device: str) -> dict:
    return CONTENDERS if device == "cpu" else CONTENDERS_ON_A_GPU


def source(settings: dict) -> str:
    """Return the file or folder that a contender reads."""
    if "packed" in settings:
        return f"packed-{settings['packed']}"
    return f"{settings['gguf']}.gguf" if "gguf" in settings else "hf"


class Worker:
    """A contender in a process of its own; `ask` a (batch, prompt tokens, new tokens)."""

    def __init__(self, name: str, settings: dict, folder: Path, device: str):
        print(f"starting {name}", file=sys.stderr)
        command = [sys.executable, __file__, "serve", "--serve", name, "--folder", str(folder), "--device", device]
        started, pipes = time.perf_counter(), {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes)
        self.read()
        self.first_token = time.perf_counter() - started
        self.facts = self.read()

    def read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit("a contender ended early")

    def ask(self, question) -> dict:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.read()

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def serve(name: str, folder: Path, device: str):
    """Load a contender, generate a token, say so, tell of it, and then answer questions."""
    settings = contenders_on(device)[name]
    path = folder / source(settings)
    contender = LlamaCpp(path) if "gguf" in settings else Transformers(name, path, settings, device)
    contender.generate(1, 64, 1)
    print("{}", flush=True)
    facts = {"peak": measure_peak(device), "bytes": contender.bytes}
    facts |= {"loading": contender.loading, "preparing": contender.preparing}
    print(json.dumps(facts), flush=True)
    contender.generate(1, 64, 4)
    for line in sys.stdin:
        prefill, steps = contender.generate(*json.loads(line))
        print(json.dumps({"prefill": prefill, "steps": steps}), flush=True)


def measure_peak(device: str) -> int:
    """Return the bytes of memory that this process had at most, or on a GPU its tensors."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


class Transformers:
    def __init__(self, name: str, folder: Path, settings: dict, device: str):
        if name.startswith("upstream"):
            from transformers import LlamaForCausalLM as model_class
        else:
            from hf_llama3 import Llama3ForCausalLM as model_class
        how = {"dtype": "auto"}
        if device != "cpu":
            how["device_map"] = device
        if "torchao" in settings:
            how["quantization_config"] = make_quantization(**settings["torchao"])
        started = time.perf_counter()
        self.model, loaded = model_class.from_pretrained(folder, **how).eval(), time.perf_counter()
        if "optimize" in settings:
            from hf_llama3 import optimize

            optimize(self.model, **settings["optimize"])
        self.loading, self.preparing = loaded - started, time.perf_counter() - loaded
        self.options = {}
        if settings.get("stock"):  # on a GPU the library compiles by itself
            self.options = {"cache_implementation": "static"}
            if device == "cpu":
                from transformers import CompileConfig

                self.options["compile_config"] = CompileConfig(mode="default", dynamic=True)
                self.options["compile_config"]._compile_all_devices = True

    @property
    def bytes(self) -> int:
        from hf_llama3.measure.bench import weight_bytes

        return weight_bytes(self.model)

    def generate(self, batch: int, prompt: int, new: int):
        from hf_llama3.measure.bench import time_generation

        return time_generation(self.model, prompt, new, batch, **self.options)


def make_quantization(name: str, **how):
    """Return what has the library quantise a model on loading by the torchao configuration of this name."""
    import torchao.quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(torchao.quantization, name)(**how))


class LlamaCpp:
    """Greedy steps through its Python binding, the likeliest token taken by numpy."""

    def __init__(self, path: Path):
        import llama_cpp

        threads, started = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())), time.perf_counter()
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=16384, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.path, self.loading, self.preparing = path, time.perf_counter() - started, 0.0

    @property
    def bytes(self) -> int:
        import gguf

        sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(self.path).tensors}
        if "output.weight" in sizes:
            del sizes["token_embd.weight"]  # of which a step reads a row
        return sum(sizes.values())

    def generate(self, batch: int, prompt: int, new: int):
        self.llama.reset()
        started, times = time.perf_counter(), []
        tokens = np.random.default_rng(0).integers(3, GEOMETRY["vocab_size"], prompt).tolist()
        for _ in range(new):
            self.llama.eval(tokens)
            tokens = [int(self.llama._scores[-1].argmax())]
            times.append(time.perf_counter())
        return times[0] - started, np.diff(times).tolist()


def write_models(folder: Path, config, with_gguf: bool):
    """Write random weights as a Hugging Face folder and, where the package gguf is, in llama.cpp's format."""
    from hf_llama3 import Llama3ForCausalLM

    print("writing random weights ...", file=sys.stderr)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Llama3ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            for part in parameter.view(-1).split(2**24):
                part.copy_(torch.randn(min(2**22, len(part))).repeat(4)[: len(part)] * 0.02)
            if parameter.ndim == 1:
                parameter.fill_(1)
    # upstream's type, which both classes read
    model.config.model_type, model.config.architectures = "llama", ["LlamaForCausalLM"]
    model.save_pretrained(folder / "hf")
    written = json.loads((folder / "hf" / "config.json").read_text()) | {"model_type": "llama"}
    (folder / "hf" / "config.json").write_text(json.dumps(written))
    if not with_gguf:
        return
    from hf_llama3.conversion import convert

    if importlib.util.find_spec("gguf") is None:
        print("llama.cpp is left out: pip install llama-cpp-python gguf", file=sys.stderr)
        return
    for kind in ("BF16", "Q8_0", "Q4_0"):  # the head of a q4_0 model has q8_0, as that of our int4 has int8
        convert(folder / "hf", folder / f"{kind}.gguf", dtype=kind.lower(), verify=False)


def time_kernels(args):
    """Time candidates' products with a layer's matrix alone, of which the copies do not fit a processor's caches."""
    weights = [torch.randn(8192, 2048).mul_(0.02).bfloat16() for _ in range(8)]
    candidates = {name: make for name, make in CANDIDATES.items() if runs_here(make, weights[0])}
    products = {name: [make(weight) for weight in weights] for name, make in candidates.items()}
    print("\n| ms for so many rows | " + " | ".join(map(str, args.batches)) + " |\n|---|" + "---:|" * len(args.batches))
    times = {name: {rows: [] for rows in args.batches} for name in products}
    for _ in range(args.rounds + 1):  # the first compiles
        for rows in args.batches:
            x = torch.randn(rows, 2048).bfloat16()
            for name, kernels in products.items():
                if rows > MANY and name in ONLY_FOR_FEW:
                    continue
                started = time.perf_counter()
                for kernel in kernels:
                    kernel(x)
                times[name][rows].append((time.perf_counter() - started) / len(kernels))
    for name, by_rows in times.items():
        cells = [f"{statistics.median(seconds[1:]) * 1e3:.2f}" if seconds else "" for seconds in by_rows.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")


def runs_here(make, weight: torch.Tensor) -> bool:
    """Tell whether a candidate is there, and right: some are on one kind of processor alone."""
    x = torch.randn(2, weight.shape[1]).bfloat16()
    try:
        made = make(weight)(x)
    except (ImportError, RuntimeError, NotImplementedError):
        return False
    expected = x.float() @ weight.float().T
    return bool((made.float() - expected).norm() < 0.2 * expected.norm())


def onednn_bfloat16(weight):
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def onednn_int8(weight):
    """Inputs are rounded to 8 bits, a row at a time; without VNNI its sums are wrong."""
    scale = weight.abs().amax(1).float() / 127
    packed = torch.ops.onednn.qlinear_prepack((weight.float() / scale[:, None]).round().to(torch.int8), None)
    zeros = torch.zeros(len(weight), dtype=torch.int32)

    def product(x):
        step = x.abs().amax().float() / 127
        levels = (x / step).round().to(torch.int8)
        how = (None, 1.0, 0, torch.bfloat16, "none", [], "")
        return torch.ops.onednn.qlinear_pointwise(levels, float(step), 0, packed, scale, zeros, *how)

    return product


def torch_int8(weight):
    scale = weight.abs().amax(1).float() / 127
    levels = (weight.float() / scale[:, None]).round().to(torch.int8)
    return lambda x: torch._weight_int8pack_mm(x, levels, scale.bfloat16())


def torch_int4(weight):
    groups = weight.float().unflatten(1, (-1, 32))
    low, high = groups.amin(2), groups.amax(2)
    scale = (high - low) / 15
    levels = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).flatten(1).int()
    packed = torch._convert_weight_to_int4pack_for_cpu(levels, 1)
    both = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().bfloat16()
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, 32, both)


def numba_bfloat16(weight):
    """A loop over the plain weight, as numba vectorises it, for each row."""
    loop, bits = numba_loop(), weight.view(torch.uint16).numpy()

    def product(x):
        y = torch.empty(len(x), len(weight))
        for row, out in zip(x.float().numpy(), y.numpy(), strict=True):
            loop(bits, row, out)
        return y

    return product


@functools.cache
def numba_loop():
    import numba
    from llvmlite import ir

    @numba.extending.intrinsic
    def widen(context, bits):
        def emit(context, builder, signature, arguments):
            number = builder.zext(arguments[0], ir.IntType(32))
            return builder.bitcast(builder.shl(number, ir.Constant(number.type, 16)), ir.FloatType())

        return numba.float32(numba.uint16), emit

    @numba.njit(fastmath=True)
    def loop(weight, x, y):
        for o in range(weight.shape[0]):
            total = np.float32(0)
            for i in range(weight.shape[1]):
                total += widen(weight[o, i]) * x[i]
            y[o] = total

    return loop


def of_ours(module: str, name: str):
    def make(weight):
        return getattr(importlib.import_module(f"hf_llama3.cpu.kernels.{module}"), name)(weight)

    return make


CANDIDATES = {
    "F.linear, bfloat16 (upstream)": lambda weight: lambda x: torch.nn.functional.linear(x, weight),
    "F.linear, float16": lambda weight: functools.partial(linear_as, weight.half()),
    "F.linear, float32": lambda weight: functools.partial(linear_as, weight.float()),
    "oneDNN's packed bfloat16": onednn_bfloat16,
    "numba's loop, bfloat16": numba_bfloat16,
    "ours, bfloat16": of_ours("exact", "ExactKernel"),
    "oneDNN's packed int8, inputs rounded": onednn_int8,
    "torch._weight_int8pack_mm": torch_int8,
    "ours, int8": of_ours("int8_int4", "Int8Kernel"),
    "torch._weight_int4pack_mm_for_cpu": torch_int4,
    "ours, int4": of_ours("int8_int4", "Int4Kernel"),
}
MANY = 4  # rows above which some take too long to be worth a measurement
ONLY_FOR_FEW = ("F.linear, float16", "numba's loop, bfloat16", "oneDNN's packed int8, inputs rounded")


def linear_as(weight, x):
    return torch.nn.functional.linear(x.to(weight.dtype), weight)


def time_products(args):
    """Time steps of optimised models beside their matrix products alone, one after another with inputs at hand."""
    from transformers import AutoModelForCausalLM

    import hf_llama3
    from hf_llama3.measure.bench import time_generation

    print("| rows | weights | ms a step | products alone | share |\n|---:|---|---:|---:|---:|")
    for quantize in (None, "int8", "int4"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make_config(args), dtype=torch.bfloat16)
        model = hf_llama3.optimize(model, quantize=quantize)
        layers = [module for module in model.modules() if hasattr(module, "in_features")]
        for rows in args.batches:
            inputs = [torch.randn(rows, 1, layer.in_features).bfloat16() for layer in layers]
            steps, products = [], []
            for _ in range(args.rounds + 1):  # the first warms up
                steps.append(time_generation(model, args.contexts[0], args.steps + 1, rows)[1])
                started = time.perf_counter()
                with torch.inference_mode():
                    for layer, x in zip(layers, inputs, strict=True):
                        layer(x)
                products.append(time.perf_counter() - started)
            step = statistics.median(seconds for times in steps[1:] for seconds in times) * 1e3
            alone = statistics.median(products[1:]) * 1e3
            print(f"| {rows} | {quantize or 'bfloat16'} | {step:.1f} | {alone:.1f} | {alone / step:.2f} |")


if __name__ == "__main__":
    main()

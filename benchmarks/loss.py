"""
Measure time and memory of the full-vocabulary loss and its gradient: fused, dense, TRL's, Liger's, bare products.

    python benchmarks/loss.py                  # CPU, float32
    python benchmarks/loss.py --gpu            # Qwen3-1.7B, 4B and 8B shapes, bfloat16

The contenders take turns within one process for the times. Memory is the peak above what the inputs hold: on CPU the
growth of the resident set (ru_maxrss) of a fresh process for each contender, on a GPU what PyTorch has allocated. Each
contender computes the gradient of the student's hidden states alone, in so far as it can leave the head's out.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from opsd.losses import fused_linear_jsd, fused_linear_sampled_token_loss, generalized_jsd
from opsd.run.flags import SWITCH

MIB = 2**20
VOCAB_SIZE = 151_936
SHAPES = {"Qwen3-1.7B": 2048, "Qwen3-4B": 2560, "Qwen3-8B": 4096}  # hidden sizes
TEMPERATURE = 1.1
CLIP = 0.05


class Inputs(NamedTuple):
    student: Tensor  # (N, H)
    teacher: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    token_ids: Tensor  # (N,)


def make_inputs(num_tokens: int, hidden_size: int, vocab_size: int, device: str, dtype: torch.dtype) -> Inputs:
    """Hidden states whose logits have a standard deviation of 2, the roles' a difference of 0.3."""
    torch.manual_seed(0)
    student = torch.randn(num_tokens, hidden_size, device=device)
    teacher = torch.randn(num_tokens, hidden_size, device=device).mul_(0.15).add_(student)
    weight = torch.empty(vocab_size, hidden_size, device=device, dtype=dtype).normal_(std=2 * hidden_size**-0.5)
    token_ids = torch.randint(vocab_size, (num_tokens,), device=device)
    return Inputs(student.to(dtype), teacher.to(dtype), weight, token_ids)


# Contenders: forward and backward pass of the loss's mean


def products(inputs: Inputs, beta: float, chunk_size: int) -> None:
    """What cannot be avoided: the logits of both roles and the gradient of the student's hidden states."""
    student, teacher, weight, _ = inputs
    half = {"out_dtype": torch.float32} if weight.dtype == torch.bfloat16 else {}
    logits = torch.empty(chunk_size, len(weight), device=weight.device, dtype=torch.float32)
    gradient = logits.to(weight.dtype)
    for start in range(0, len(student), chunk_size):
        rows = slice(start, start + chunk_size)
        num_rows = len(student[rows])
        torch.mm(student[rows], weight.T, out=logits[:num_rows], **half)
        torch.mm(teacher[rows], weight.T, out=logits[:num_rows], **half)
        torch.mm(gradient[:num_rows], weight, **half)


def fused(inputs: Inputs, beta: float, chunk_size: int) -> None:
    student = inputs.student.detach().requires_grad_()
    loss = fused_linear_jsd(
        student, inputs.teacher, inputs.weight, beta=beta, temperature=TEMPERATURE, clip=CLIP, chunk_size=chunk_size
    )
    loss.mean().backward()


def fused_sampled(inputs: Inputs, beta: float, chunk_size: int) -> None:
    student = inputs.student.detach().requires_grad_()
    fused_linear_sampled_token_loss(
        student, inputs.teacher, inputs.weight, inputs.token_ids, temperature=TEMPERATURE, chunk_size=chunk_size
    ).mean().backward()


def fused_trained_head(inputs: Inputs, beta: float, chunk_size: int) -> None:
    fused(inputs._replace(weight=inputs.weight.detach().requires_grad_()), beta, chunk_size)


def dense(inputs: Inputs, beta: float, chunk_size: int) -> None:
    student = inputs.student.detach().requires_grad_()
    with torch.no_grad():
        teacher_logits = inputs.teacher @ inputs.weight.T
    loss = generalized_jsd(student @ inputs.weight.T, teacher_logits, beta=beta, temperature=TEMPERATURE, clip=CLIP)
    loss.mean().backward()


def trl_chunked(inputs: Inputs, beta: float, chunk_size: int) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student = inputs.student.detach().requires_grad_()
    divergence, _ = ChunkedDivergenceFunction.apply(
        student, inputs.weight, None, inputs.teacher, inputs.weight, None, beta, TEMPERATURE
    )
    divergence.mean().backward()


def liger_chunked(inputs: Inputs, beta: float, chunk_size: int) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=TEMPERATURE, chunk_size=chunk_size,
        compiled=inputs.weight.is_cuda,
    )  # fmt: skip
    student = inputs.student.detach().requires_grad_()
    loss(student, inputs.weight, inputs.teacher, inputs.weight, inputs.token_ids).backward()


class Contender(NamedTuple):
    run: Callable[[Inputs, float, int], None]
    betas: tuple[float, ...]
    label: str


CONTENDERS = {
    "products": Contender(products, (0.0,), "the three bare products"),
    "fused": Contender(fused, (0.0, 0.5, 1.0), "`fused_linear_jsd`, clip, statistics"),
    "fused_trained_head": Contender(fused_trained_head, (0.0,), "the same with a trained head (four products)"),
    "fused_sampled": Contender(fused_sampled, (0.0,), "`fused_linear_sampled_token_loss`"),
    "dense": Contender(dense, (0.0, 0.5, 1.0), "`generalized_jsd`, dense, clip"),
    "trl": Contender(trl_chunked, (0.0, 0.5), "TRL `ChunkedDivergenceFunction`, no clip"),
    "liger": Contender(liger_chunked, (0.5,), "Liger `LigerFusedLinearJSDLoss`, no clip, head's gradient too"),
}


def available_contenders() -> list[str]:
    packages = {"trl": "trl.kernels", "liger": "liger_kernel"}
    return [
        name
        for name in CONTENDERS
        if name not in packages or (find_spec(packages[name].split(".")[0]) and find_spec(packages[name]))
    ]


# Measurements


def seconds_of(name: str, inputs: Inputs, beta: float, chunk_size: int) -> float:
    if inputs.weight.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    CONTENDERS[name].run(inputs, beta, chunk_size)
    if inputs.weight.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident_growth(name: str, beta: float, num_tokens: int, arguments: argparse.Namespace) -> float:
    """Peak MiB of a contender above its inputs, in a fresh process on the CPU."""
    command = [
        sys.executable, __file__, "--memory_of", name, "--betas", str(beta), "--num_tokens", str(num_tokens),
        "--hidden_size", str(arguments.hidden_size), "--vocab_size", str(arguments.vocab_size),
        "--chunk_size", str(arguments.chunk_size),
    ]  # fmt: skip
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout) / MIB


def report_resident_growth(arguments: argparse.Namespace) -> None:
    contender = CONTENDERS[arguments.memory_of]
    # Once in small, so that what libraries and thread pools take is there before the inputs are
    contender.run(make_inputs(8, 64, 1000, "cpu", torch.float32), arguments.betas[0], 4)
    inputs = make_inputs(arguments.num_tokens, arguments.hidden_size, arguments.vocab_size, "cpu", torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contender.run(inputs, arguments.betas[0], arguments.chunk_size)
    sys.stdout.write(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))


def allocated_growth(name: str, inputs: Inputs, beta: float, chunk_size: int) -> float:
    """Peak MiB of a contender above its inputs, on a GPU."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    CONTENDERS[name].run(inputs, beta, chunk_size)
    return (torch.cuda.max_memory_allocated() - before) / MIB


def gradient_error(inputs: Inputs, beta: float, num_tokens: int = 64) -> float:
    """Relative error of the fused gradient of some tokens, against the dense form in float64."""
    student, teacher = (hidden[:num_tokens].detach() for hidden in (inputs.student, inputs.teacher))
    settings = {"beta": beta, "temperature": TEMPERATURE, "clip": CLIP}
    reference = student.double().requires_grad_()
    weight = inputs.weight.double()
    generalized_jsd(reference @ weight.T, teacher.double() @ weight.T, **settings).sum().backward()
    student.requires_grad_()
    fused_linear_jsd(student, teacher, inputs.weight, **settings).sum().backward()
    return ((student.grad.double() - reference.grad).norm() / reference.grad.norm()).item()


def measure_times(cases: list[tuple[str, float]], inputs: Inputs, chunk_size: int, repeats: int) -> dict:
    """Seconds of each case in `repeats` rounds, after one that does not count; cases without memory are left out."""
    seconds: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
    for repeat in range(repeats + 1):
        for case in list(seconds):
            try:
                value = seconds_of(case[0], inputs, case[1], chunk_size)
            except torch.OutOfMemoryError:
                del seconds[case]
                torch.cuda.empty_cache()
                continue
            if repeat > 0:
                seconds[case].append(value)
    return seconds


def time_columns(case: tuple[str, float], seconds: dict) -> str:
    """Fastest round in milliseconds, and the median over the rounds of its ratio to the products in the same round."""
    if case not in seconds:
        return "out of memory | "
    ratios = [own / bare for own, bare in zip(seconds[case], seconds["products", 0.0], strict=True)]
    return f"{1e3 * min(seconds[case]):,.0f} | {statistics.median(ratios):.2f}"


def case_columns(name: str, beta: float) -> str:
    return f"{CONTENDERS[name].label} | {'' if name in ('products', 'fused_sampled') else f'{beta:g}'}"


def benchmark_cpu(arguments: argparse.Namespace) -> str:
    """Table of the CPU. The dense form is measured with fewer tokens, since it takes tens of GiB with all of them."""
    all_tokens, few_tokens, chunk_size = arguments.num_tokens, arguments.dense_tokens, arguments.chunk_size
    cases = [
        (name, beta)
        for name in available_contenders()
        for beta in CONTENDERS[name].betas
        if name == "products" or not arguments.betas or len(CONTENDERS[name].betas) == 1 or beta in arguments.betas
    ]
    memory = {}
    for case in cases:
        for num_tokens in (few_tokens, all_tokens):
            if num_tokens == few_tokens or case[0] != "dense":
                memory[case, num_tokens] = resident_growth(*case, num_tokens, arguments)
        if case[0] == "dense":  # linear in the number of tokens
            memory[case, all_tokens] = memory[case, few_tokens] * all_tokens / few_tokens

    seconds = {}
    for num_tokens, chosen in (
        (few_tokens, [case for case in cases if case[0] in ("products", "dense")]),
        (all_tokens, [case for case in cases if case[0] != "dense"]),
    ):
        inputs = make_inputs(num_tokens, arguments.hidden_size, arguments.vocab_size, "cpu", torch.float32)
        seconds[num_tokens] = measure_times(chosen, inputs, min(chunk_size, num_tokens), arguments.repeats)

    lines = [
        f"CPU ({torch.get_num_threads()} threads, {platform.machine()}), PyTorch {torch.__version__}, float32, "
        f"V = {arguments.vocab_size:,}, H = {arguments.hidden_size:,}, chunks of {chunk_size} tokens. "
        f"Times of {all_tokens:,} tokens, of the dense form of {few_tokens:,}, each as the fastest of "
        f"{arguments.repeats} rounds and as the median ratio to the bare products in the same round.",
        "",
        f"| | beta | ms | x products | extra MiB, N = {few_tokens:,} | extra MiB, N = {all_tokens:,} | of dense |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, beta in cases:
        num_tokens = few_tokens if name == "dense" else all_tokens
        extra = memory[(name, beta), all_tokens]
        reference = memory.get((("dense", beta), all_tokens))
        share = f"{100 * extra / reference:.1f} %" if reference and name in ("fused", "trl", "liger") else ""
        lines.append(
            f"| {case_columns(name, beta)} | {time_columns((name, beta), seconds[num_tokens])} "
            f"| {memory[(name, beta), few_tokens]:,.0f} | {'(' if name == 'dense' else ''}{extra:,.0f}"
            f"{')' if name == 'dense' else ''} | {share} |"
        )
    lines += ["", f"In parentheses: scaled from {few_tokens:,} tokens, to which it is proportional."]
    if "liger" not in available_contenders():
        lines.append("Liger is not installed here.")
    else:
        lines.append("Liger runs without `torch.compile` here, and with it on a GPU.")
    return "\n".join(lines)


def benchmark_gpu(arguments: argparse.Namespace) -> str:
    """Table of a GPU, with the chunk size that the fused form chooses, which the others are given too."""
    lines = [
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, bfloat16, V = {arguments.vocab_size:,}. "
        f"Fastest of {arguments.repeats} rounds, median ratio to the bare products in the same round, peak memory "
        "above the inputs, relative error of the gradient against float64.",
        "",
        "| shape | N | | beta | ms | x products | extra MiB | gradient error |",
        "|---|---:|---|---|---:|---:|---:|---:|",
    ]
    for shape, hidden_size in SHAPES.items():
        for num_tokens in arguments.gpu_tokens:
            inputs = make_inputs(num_tokens, hidden_size, arguments.vocab_size, "cuda", torch.bfloat16)
            cases = [(name, beta) for name in available_contenders() for beta in CONTENDERS[name].betas]
            seconds = measure_times(cases, inputs, arguments.gpu_chunk_size, arguments.repeats)
            for case in cases:
                extra = ""
                if case in seconds:
                    extra = f"{allocated_growth(case[0], inputs, case[1], arguments.gpu_chunk_size):,.0f}"
                error = f"{gradient_error(inputs, case[1]):.1e}" if case[0] == "fused" else ""
                lines.append(
                    f"| {shape} | {num_tokens:,} | {case_columns(*case)} | {time_columns(case, seconds)} "
                    f"| {extra} | {error} |"
                )
            del inputs
            torch.cuda.empty_cache()
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", **SWITCH, help="Qwen3 shapes in bfloat16 on the first GPU")
    parser.add_argument("--num_tokens", type=int, default=2048, help="on the CPU")
    parser.add_argument("--dense_tokens", type=int, default=256, help="of the dense form on the CPU")
    parser.add_argument("--hidden_size", type=int, default=1024, help="on the CPU")
    parser.add_argument("--vocab_size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--chunk_size", type=int, default=256, help="on the CPU")
    parser.add_argument("--gpu_tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--gpu_chunk_size", type=int, default=768)
    parser.add_argument("--betas", type=float, nargs="+", help="on the CPU; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="Markdown file; default: standard output only")
    parser.add_argument("--memory_of", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu: PyTorch finds no CUDA device here")
    if arguments.memory_of:
        return report_resident_growth(arguments)

    table = benchmark_gpu(arguments) if arguments.gpu else benchmark_cpu(arguments)
    command = " ".join(["python benchmarks/loss.py", *sys.argv[1:]])
    text = f"# Time and memory of the loss\n\n`{command}`\n\n{table}\n"
    sys.stdout.write(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

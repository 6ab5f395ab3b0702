"""`snapgen bench`: a network beside its peers, as a table and as JSON."""

import argparse
import os
import platform
import shlex

from ..errors import UserError
from ..files import git_commit, now, write_json
from .common import check_output, note, quiet_libraries

HEADER = ("model", "parameters", "GMACs", "seconds", "GFLOP/s", "of peak", "memory", "x ours")


def _cells(line: dict) -> tuple[str, ...]:
    sizes = (line["title"], f"{line['parameters'] / 1e6:.1f} M", f"{line['macs'] / 1e9:.1f}")
    if "skipped" in line:
        return *sizes, "skipped", "", "", "", ""
    ratio = f"{line['times_ours']:.2f}" if "times_ours" in line else ""
    return *sizes, f"{line['seconds']:.3g}", f"{line['gflops']:.0f}", f"{line['share_of_peak']:.0%}", f"{line['memory_gib']:.2f} GiB", ratio


def _print(cells: tuple[str, ...]) -> None:
    print(f"{cells[0]:<28}" + "".join(f"{cell:>12}" for cell in cells[1:]), flush=True)


def bench(args: argparse.Namespace) -> int:
    """Measure, print line by line, and write the figures if asked."""
    if args.json:
        check_output(args.json, ".json")
    quiet_libraries(args.scale)

    import torch

    from .. import bench as benchmark
    from ..peers import BENCHMARKS

    contenders = BENCHMARKS[args.what]
    unknown = [name for name in args.only or () if name not in contenders]
    if unknown:
        raise UserError(f"unknown model {unknown[0]!r}: choose among {', '.join(contenders)}")
    device, dtype = benchmark.device_and_dtype()
    usual = [name for name in contenders if device.type == "cuda" or not contenders[name].compiled]  # on CPUs it gains little
    names = [name for name in contenders if name in args.only] if args.only else usual
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"one forward pass, batch 1, {str(dtype).removeprefix('torch.')}, {machine}, median of {args.runs}")
    _print(HEADER)
    lines = []
    for line in benchmark.run(args.what, names, args.runs):
        lines.append(line)
        _print(_cells(line))
        if "skipped" in line:
            note(f"{line['title']} was skipped: {line['skipped']}")
    ours = next((line for line in lines if line["name"] == "ours" and "seconds" in line), None)
    if ours:
        print(f"floor of ours, its MACs at the peak of a matrix product ({ours['matmul_gflops']:.0f} GFLOP/s): {ours['floor_seconds']:.3g} s; measured {ours['seconds'] / ours['floor_seconds']:.2f} times that")
    if args.json:
        facts = {"command": shlex.join(["snapgen", *args.argv]), "commit": git_commit(), "date": now(), "machine": machine, "cores": os.cpu_count(), "dtype": str(dtype), "runs": args.runs}
        write_json(args.json, {**facts, "models": lines})
    return 0

"""`snapgen bench`: a network beside its peers, as a table and as JSON."""

import argparse
import os
import platform
import shlex
from collections.abc import Iterator

from ..errors import UserError
from ..files import git_commit, now, write_json
from .common import check_output, note, quiet_libraries

HEADER = ("model", "parameters", "GMACs", "memory", "seconds", "GFLOP/s", "of peak", "ratio (lowest-highest)")


def _ratio(times: dict) -> str:
    return f"{times['ratio']:.2f} ({times['lowest']:.2f}-{times['highest']:.2f})" if "ratio" in times else ""


def _rows(line: dict) -> Iterator[tuple[str, ...]]:
    """A row for the model as it is built and, where that matters, one for channels last."""
    sizes = (line["title"], f"{line['parameters'] / 1e6:.1f} M", f"{line['macs'] / 1e9:.1f}")
    if "skipped" in line:
        yield *sizes, "", "skipped", "", "", ""
        return
    for layout, times in line["layouts"].items():
        cells = (f"{times['median']:.3g}", f"{times['gflops']:.0f}", f"{times['share_of_peak']:.0%}", _ratio(times))
        yield (*sizes, f"{line['memory_gib']:.2f} GiB", *cells) if layout == "as_built" else ("  channels last", "", "", "", *cells)


def _print(cells: tuple[str, ...]) -> None:
    print(f"{cells[0]:<28}" + "".join(f"{cell:>11}" for cell in cells[1:-1]) + f"{cells[-1]:>24}", flush=True)


def bench(args: argparse.Namespace) -> int:
    """Measure, print line by line, and write the figures if asked."""
    if args.json:
        check_output(args.json, ".json")
    quiet_libraries(args.scale)
    if args.teacher and args.what != "kd":
        raise UserError(f"bench {args.what} has no teacher: --teacher goes with bench kd")
    if args.what == "kd":
        return _bench_kd(args)
    if args.what == "export":
        return _bench_export(args)
    if args.what == "steps":
        return _bench_steps(args)

    from .. import bench as benchmark
    from ..peers import BENCHMARKS

    contenders = BENCHMARKS[args.what]
    unknown = [name for name in args.only or () if name not in contenders]
    if unknown:
        raise UserError(f"unknown model {unknown[0]!r}: choose among {', '.join(contenders)}")
    device, dtype = benchmark.device_and_dtype()
    machine = _machine()
    usual = [name for name in contenders if device.type == "cuda" or not contenders[name].compiled]  # on CPUs it gains little
    names = [name for name in contenders if name in args.only] if args.only else usual
    print(f"one forward pass, batch 1, {str(dtype).removeprefix('torch.')}, {machine}, median of {args.runs}")
    print(f"ratio: seconds over those of {'the step before' if args.what == 'chain' else 'ours'}, the two taking turns")
    _print(HEADER)
    lines = []
    for name in names:
        line = benchmark.run(args.what, name, args.runs)
        lines.append(line)
        for row in _rows(line):
            _print(row)
        if "skipped" in line:
            note(f"{line['title']} was skipped: {line['skipped']}")
    for line in lines:
        if args.what == "unet" and line["name"] == "ours" and "skipped" not in line:
            seconds = line["layouts"]["as_built"]["median"]
            print(f"floor of ours, its MACs at the peak of a matrix product ({line['matmul_gflops']:.0f} GFLOP/s): {line['floor_seconds']:.3g} s; measured {seconds / line['floor_seconds']:.2f} times that")
    if args.json:
        write_json(args.json, {**_facts(args), "dtype": str(dtype), "models": lines})
    return 0


def _machine() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _facts(args: argparse.Namespace) -> dict:
    """How a result came to be."""
    return {"command": shlex.join(["snapgen", *args.argv]), "commit": git_commit(), "date": now(), "machine": _machine(), "cores": os.cpu_count(), "runs": args.runs}


def _bench_kd(args: argparse.Namespace) -> int:
    """Steps of stage `kd`, and what one costs at the paper's size."""
    if args.only:
        raise UserError("bench kd compares its three kinds of steps: it takes no --only")
    import torch

    from ..bench_kd import paper_costs, paper_steps, state_bytes, time_steps
    from ..memory import keep_freed_memory

    keep_freed_memory()  # as `train` does
    steps = time_steps(args.scale, args.runs, args.teacher)
    print(f"a training step of {steps['batch_size']} samples at {args.scale}, {_machine()}, median of {args.runs}; ratios in turns")
    for mode, what in (("plain", "without a teacher"), ("stored", "its answers from the disk"), ("live", "the teacher asked")):
        print(f"{what:<28}{steps[mode]['median']:>8.3f} s{steps[mode]['ratio']:>8.2f}")
    costs = paper_costs()
    print(f"at the paper's size, a sample of 1024 pixels: student {costs['student_macs'] / 1e9:.0f} GMACs forward, SD3.5-Large {costs['teacher_macs'] / 1e9:.0f};")
    print(f"a step takes {costs['step_macs_ratio']:.1f} times the MACs of one without a teacher, and keeps {costs['kd_activation_bytes'] / 2**30:.1f} GiB of activations ({costs['task_activation_bytes'] / 2**30:.1f} without)")
    measured = None
    if torch.cuda.is_available():
        try:
            measured = paper_steps(args.runs)
        except torch.OutOfMemoryError:
            note("a step at the paper's size was skipped: this GPU has no room for it")
    if measured:
        for mode, what, kept in (("plain", "without a teacher", "task_activation_bytes"), ("live", "the teacher asked", "kd_activation_bytes")):
            found, expected = measured[mode], state_bytes(costs, mode == "live") + measured["batch_size"] * costs[kept]
            print(f"measured, {what}: {found['median']:.3f} s for {measured['batch_size']} samples, {found['ratio']:.1f} times; at most {found['peak_bytes'] / 2**30:.1f} GiB (expected {expected / 2**30:.1f}), {found['sample_bytes'] / 2**30:.1f} a sample")
    if args.json:
        write_json(args.json, {**_facts(args), "scale": args.scale, "steps": steps, "paper": costs, "paper_measured": measured})
    return 0


def _bench_steps(args: argparse.Namespace) -> int:
    """A picture in few steps beside one in many."""
    if args.only:
        raise UserError("bench steps compares two ways to a picture: it takes no --only")
    from ..bench_steps import COUNTS, paper_training, time_pictures

    print(f"pictures at {args.scale}, from prompts to pixels, {_machine()}, median of {args.runs}; in turns")
    times = {}
    for count in COUNTS:
        times[str(count)] = found = time_pictures(args.scale, args.runs, count)
        print(f"{count} at once" if count > 1 else "one picture")
        for name in ("before", "after"):
            line = found[name]
            parts = ", ".join(f"{part} {1000 * seconds:.1f} ms" for part, seconds in line["parts"].items())
            print(f"  {line['stage']:<11}{line['steps']:>3} steps{', guided' if line['guidance'] != 1 else '':<8}{line['median']:>8.3f} s   ({parts})")
        print(f"  step distillation: {found['ratio']:.1f} times as fast")
    costs = paper_training()
    print("training it at the paper's size, counted for a sample of 1024 pixels:")
    for turn, who in (("heads_turn", "the heads' turn"), ("students_turn", "the student's turn")):
        print(f"  {who:<20}{costs[f'{turn}_macs'] / 1e12:>4.0f} TMACs, {costs[f'{turn}_seconds']:.2f} s at 40% of an A100's peak")
    print(f"  memory: {costs['state_bytes'] / 2**30:.0f} GiB for weights and optimisers, {costs['activation_bytes'] / 2**30:.1f} GiB of activations a sample without checkpointing")
    if args.json:
        write_json(args.json, {**_facts(args), "scale": args.scale, "pictures": times, "paper": costs})
    return 0


def _bench_export(args: argparse.Namespace) -> int:
    """The paper's networks on their way to a phone."""
    from ..bench_export import BITS, PARTS, run

    unknown = [name for name in args.only or () if name not in PARTS]
    if unknown:
        raise UserError(f"unknown network {unknown[0]!r}: choose among {', '.join(PARTS)}")
    results = {}
    for name in args.only or PARTS:
        results[name] = found = run(name)
        print(f"{name}, {found['parameters'] / 1e6:.1f} M random weights: " + ", ".join(f"{what} {seconds:.0f} s" for what, seconds in found["seconds"].items()))
        print(f"  package {found['megabytes']:.1f} MB; replayed against torch {found['fp32_db']:.1f} dB in fp32, {found['fp16_db']:.1f} dB in fp16; peak memory {found['memory_gib']:.1f} GiB converting, {found['peak_memory_gib']:.1f} GiB in all")
        if "bits" in found:
            print(f"  palettes of {found['bits']:.2f} bits on average (asked: {BITS:g}): {found['packed_megabytes']:.1f} MB, computes what the palettised network does to {found['packed_db']:.1f} dB")
    if args.json:
        write_json(args.json, {**_facts(args), "networks": results})
    return 0

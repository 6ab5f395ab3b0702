"""`snapgen export`: a pipeline as Core ML packages, and proof that they compute the same."""

import argparse
import shlex
from pathlib import Path

from ..errors import UserError, reason
from ..files import git_commit, now, write_json
from ..paths import home
from ..scales import SAMPLING
from .common import check_output, quiet_libraries, stage_of


def check_folder(out: Path) -> Path:
    """Find out before any work whether a bundle can be put at `out`. Raises UserError.

    What is replaced has to be a bundle: a wrong --out must not cost anybody a folder of something else.
    """
    try:
        if out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").is_file():
            raise UserError(f"{str(out)!r} is a folder with something else in it: name a new one, or a bundle to replace")
        if out.exists() and not out.is_dir():
            raise UserError(f"{str(out)!r} is a file, and a bundle is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {str(out)!r}: {reason(error)}") from None
    return out


def export(args: argparse.Namespace) -> int:
    """Write the bundle, verify it if asked, and say where it lies."""
    if args.json:
        check_output(args.json, ".json")
    stage = stage_of(args, "distilled")
    out = check_folder(args.out or home() / "exports" / "coreml" / f"{args.scale}-{stage}")
    quiet_libraries(args.scale)

    from .. import load
    from ..export import coreml, macos, verify

    pipe = load(args.scale, stage, args.checkpoint, decoder="tiny")
    guided = SAMPLING[stage][1] != 1
    made = coreml.export(pipe, out, {"scale": args.scale, "stage": stage}, args.target, guided, args.bits, args.core_ai)
    print("what the Neural Engine has no part for" + "".join(f"\n  {name}: {len(found['leaves'])} kinds of operations" for name, found in coreml.read_manifest(out).get("lint", {}).items()) + "\n  which and why: manifest.json, lint")
    if args.verify:
        figures = verify.verify(out, pipe, made)
        write_json(out / "manifest.json", coreml.read_manifest(out) | {"parity": figures})
        print(f"{'part':<32}{'output':<24}{'fp32':>9}{'fp16':>9}{'Core AI':>9}   PSNR in dB against torch")
        for row in figures["parts"]:
            print(f"{row['part']:<32}{row['output']:<24}{row['fp32_db']:>9.1f}{row['fp16_db']:>9.1f}" + (f"{row['core_ai_db']:>9.1f}" if row["core_ai_db"] is not None else f"{'–':>9}"))
        picture = figures["picture"]
        print(f"{'a picture in ' + str(picture['steps']) + ' steps':<65}{picture['fp16_db']:>9.1f}")
        if macos.available():
            figures = verify.on_this_mac(out, pipe, made)
            write_json(out / "manifest.json", coreml.read_manifest(out) | {"macos": figures})
            print(macos.table(figures))
        else:
            print("speed and the places of operations: only a Mac can tell, by the same command")
    if args.json:
        facts = {"command": shlex.join(["snapgen", *args.argv]), "commit": git_commit(), "date": now()}
        write_json(args.json, facts | coreml.read_manifest(out))
    print(f"bundle {out}")
    return 0

"""The command that a report suggests next: complete, and quoted for the shell."""
import os
import shlex
import sys
from pathlib import Path

from runtime.cli import BUNDLED_TEXT, PLAN_FLAGS

EXAMPLE_PROMPT = "Once upon a time"
CALIBRATED_KEPT = 0.4


def suggest(args, closest=None):
    """(reason, command) to try after the command that `args` holds, as strings.

    closest: after --compare, the compressed kind of cache that was closest to the full one.
    """
    flags = {name: value for name, value in args.given.items()
             if name not in ("json", "verbose", "compare", "plan")}
    if closest is not None:
        flags["cache"] = closest
    if args.prompt is None and args.perplexity is None:
        reason = first_run(args, flags)
    elif args.bases is not None:
        reason = vary_saved_bases(args, flags)
    elif args.calibrate is None:
        reason = calibrate(args, flags)
    elif args.save is None:
        flags["save"] = save_folder(args)
        reason = "To save these bases, so that --bases can use them without calibrating again"
    else:
        use_saved(args, flags)
        reason = "To use the saved bases without calibrating again"
    return reason, shell_command(args, flags)


def first_run(args, flags):
    """Change the flags of a command that has run no cache. Returns the reason for the new one."""
    flags.update(prompt=[EXAMPLE_PROMPT], compare=True)
    if args.save is not None:
        use_saved(args, flags)
        return "To run the three caches with the saved bases"
    if args.calibrate is not None:
        flags["save"] = save_folder(args)
    return "To run the three caches with this plan"


def vary_saved_bases(args, flags):
    """The same for a command that used saved bases."""
    if args.compare:
        return "To use the compressed cache that was closest to the full one"
    if args.cache == "bibranch" and args.bits == 4:
        del flags["cache"]
        flags["compare"] = True
        return "To compare the three caches"
    flags.update(cache="bibranch", bits=4)
    return "To keep the first and last tokens exact, and the latents of the others in 4 bits"


def calibrate(args, flags):
    """The same for a command without calibration, which helps more than any other flag."""
    for name in (*PLAN_FLAGS, "save"):
        flags.pop(name, None)
    kept = min(args.kept, CALIBRATED_KEPT)
    if args.basis == "commuting":                    # it needs more numbers than the other bases
        kept = args.kept
        flags["basis"] = "commuting"
    elif world_size() > 1:                           # --basis loss works in one process only
        flags["basis"] = "whitened"
    flags.update(cache="bibranch", calibrate=BUNDLED_TEXT, kept=kept)
    if kept == 1:
        flags.pop("bits", None)
        return "To calibrate the bases on text, with exact first and last tokens"
    flags["bits"] = 4
    return (f"To keep {kept:.0%} of the numbers in 4 bits, with bases calibrated on text and exact "
            "first and last tokens")


def use_saved(args, flags):
    """Replace the flags that made the bases by those that use the saved ones."""
    for name in (*PLAN_FLAGS, "save"):
        flags.pop(name, None)
    if args.cache == "full":
        flags["cache"] = "bibranch"
    elif args.cache != "bibranch" and "compare" not in flags:
        for name in ("sinks", "window"):
            flags.pop(name, None)
    flags["bases"] = args.save


def save_folder(args):
    """A name for the folder of the bases: the model's, followed by -bases."""
    return f"{Path(args.model).resolve().name}-bases"


# The command's text ------------------------------------------------------------------------------

def shell_command(args, flags):
    """The command line of `flags`, {name as in args: value}, in the order of --help."""
    words = program()
    for name in vars(args):
        value = flags.get(name)
        option = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            if one is None:
                continue
            if one is True or name == "calibrate" and one == BUNDLED_TEXT:
                words.append(option)
            elif isinstance(one, str) and one.startswith("-"):
                words.append(f"{option}={one}")
            else:
                words += [option, str(one)]
    return shlex.join(words)


def program():
    """The words that start this program again: python lorc.py, or torchrun."""
    script = sys.argv[0] if Path(sys.argv[0]).name == "lorc.py" else "lorc.py"
    if world_size() > 1:
        return ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], script]
    return [Path(sys.executable or "python").name, script]


def world_size():
    """How many processes torchrun has started; 1 without it."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    return int(os.environ.get("WORLD_SIZE", "1")) if launched else 1

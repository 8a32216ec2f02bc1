"""The command line: its flags, which of them go together, and how a command ends.

Nothing here needs torch: --help and a mistyped flag are answered before it is imported.
"""
import argparse
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path


def main(argv=None):
    """The command line; `answer` says what the status means."""
    parser = command_line()
    args = settle(parser, parser.parse_args(argv))

    def work():
        from runtime.jobs import run
        return run(args)
    return answer("lorc", work)


def answer(name, work):
    """The status of work(): 2 and one line for what the user can mend, 130 after Ctrl-C, 141 when
    the reader of standard output (`| head`) has gone."""
    try:
        import torch

        from model import UserError
        from runtime.distributed import process_group
        with torch.inference_mode(), process_group():
            status = work()
        print(end="", flush=True)                      # standard output may be closed
        return status
    except KeyboardInterrupt:
        return 130
    except OSError as e:                     # what waits to be written must not fail again at exit
        with suppress(OSError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):
            return 141
        message = str(e)
    except UnicodeEncodeError as e:
        message = (f"standard output takes only {e.encoding}, and the text has "
                   f"{e.object[e.start]!a}; set PYTHONIOENCODING=utf-8")
    except UserError as e:
        message = str(e)
    except (MemoryError, RuntimeError) as e:        # PyTorch says it of the CPU with a RuntimeError
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(e):
            raise
        message = "not enough memory for this model, text and number of new tokens; ask for less"
    print(f"{name}: {' '.join(message.split()):.400}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, without the usage: what is wrong and where to look."""
        if os.environ.get("RANK", "0") != "0":          # torchrun: the first says it for all
            time.sleep(1)
            self.exit(2)
        self.exit(2, f"{Path(self.prog).stem}: {' '.join(message.split()):.400} (see --help)\n")


def within(kind, low, high, what):
    """An argparse type: a number of `kind` from low to high."""
    def read(text):
        with suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"should be a {what}, not {text!r:.40}")
    return read


def nonempty(text):
    """An argparse type: a name, not the empty text that an unset variable of the shell leaves."""
    if not text.strip():
        raise argparse.ArgumentTypeError("should not be empty")
    return text


PLAN_FLAGS = "kept d_min threshold schedule skip split basis calibrate".split()
SPEAK_FLAGS = "max_new_tokens temperature top_p seed chat compile".split()
DEFAULTS = {"cache": "compressed", "kept": 0.6, "threshold": math.inf, "skip": 0, "split": 0.0,
            "sinks": 4, "window": 32, "bits": 16, "max_new_tokens": 128, "temperature": 0.0,
            "top_p": 1.0, "seed": 0}


def command_line():
    """Every flag. None means not given: `settle` needs to know, and fills in the defaults."""
    p = Parser(prog="lorc.py", description="LoRC and CSKV: a LLaMA that keeps a low-rank KV cache.",
               allow_abbrev=False)
    count = within(int, 0, 10**9, "count up to 10^9")
    positive = within(int, 1, 10**9, "positive count up to 10^9")
    fraction = within(float, 1e-6, 1, "fraction in (0, 1]")
    more = within(int, 2, 10**9, "count > 1")
    flag = p.add_argument
    flag("--model", type=nonempty, default=str(Path(__file__).resolve().parents[1] / "tiny"),
         metavar="PATH",
         help="A folder in Hugging Face layout, or a Hub id. Default: tiny/ beside lorc.py.")
    group = p.add_argument_group("what to do")
    flag = group.add_mutually_exclusive_group().add_argument
    flag("--prompt", action="append", metavar="TEXT",
         help="Continue this text; repeatable; - reads standard input.")
    flag("--perplexity", type=nonempty, metavar="FILE",
         help="Score this text under the chosen cache.")
    flag("--plan", action="store_true", help="Print kappa, kappa~ and d_c per layer and stop.")
    flag = group.add_argument
    flag("--compare", action="store_true", help="Run all three caches and print them side by side.")
    flag("--save", type=nonempty, metavar="DIR",
         help="Write bases and plan to DIR/bases.safetensors.")
    flag("--json", action="store_true", help="Print one JSON object instead of text.")
    group = p.add_argument_group("the cache")
    flag = group.add_argument
    flag("--cache", choices=["full", "compressed", "bibranch"],
         help="What is kept. Default: compressed.")
    flag = group.add_mutually_exclusive_group().add_argument
    flag("--kept", type=fraction, metavar="F",
         help="rho, the fraction of the full cache's numbers that latents keep. Default: 0.6.")
    flag("--d-min", type=positive, metavar="N",
         help="d_min of Eq. 13, instead of --kept; rounded as all ranks are.")
    flag = group.add_argument
    flag("--threshold", type=within(float, -math.inf, math.inf, "number"), metavar="F",
         help="Alg. 1, l. 8: layers whose ln kappa~ is above stay full. Default: none.")
    flag("--schedule", choices=["progressive", "uniform"],
         help="Eq. 13, or the same d_c everywhere. Default: progressive; uniform with --calibrate.")
    flag("--skip", type=count, metavar="N", help="Leave the first N layers full. Default: 0.")
    flag("--split", type=within(float, -1, 1, "number in [-1, 1]"), metavar="F",
         help="Kept fraction moved from keys to values. Default: 0.")
    flag("--basis", choices=["svd", "norm", "asvd", "whitened", "commuting"],
         help="C: I, gamma^2, mean |x|, E[xx^T]. Default: svd; whitened with --calibrate. "
              "commuting: keys that need no rebuilding, from I or, with --calibrate, E[xx^T].")
    flag("--calibrate", type=nonempty, metavar="FILE",
         help="Text for asvd, whitened and commuting; its first 32 windows of up to 1,024 tokens "
              "are used.")
    flag("--bases", type=nonempty, metavar="DIR",
         help="Use the bases and the plan that --save wrote.")
    flag("--sinks", type=count, metavar="N",
         help="Exact first tokens of the bi-branch cache; left out of calibration. Default: 4.")
    flag("--window", type=count, metavar="N",
         help="Exact last tokens of the bi-branch cache. Default: 32.")
    flag("--bits", type=within(int, 4, 16, "number, 16 or 4"), choices=[16, 4],
         help="Of a bi-branch latent; 16 stands for the model's own dtype. Default: 16.")
    flag = p.add_argument_group("running").add_argument
    flag("--max-new-tokens", type=positive, metavar="N", help="Default: 128.")
    flag("--temperature", type=within(float, 0, 1e3, "number >= 0"), metavar="F",
         help="0 is greedy. Default: 0.")
    flag("--top-p", type=fraction, metavar="F",
         help="Draw from the smallest set of tokens with this probability. Default: 1.")
    flag("--seed", type=count, metavar="N", help="Default: 0.")
    flag("--chat", action="store_true", help="Wrap the prompt in the model's own chat template.")
    flag("--compile", action="store_true",
         help="Compile the decode step: slow to start, then fast; on CUDA one graph. A bi-branch "
              "cache decodes uncompiled until its window is full.")
    flag("--context", type=more, metavar="N",
         help="Window length for --perplexity. Default: the model's maximum.")
    flag("--max-tokens", type=more, metavar="N", help="Score only the first N tokens.")
    flag("--dtype", choices=["float32", "bfloat16", "float16"],
         help="Default: the checkpoint's on CUDA, float32 on the CPU.")
    flag("--device", type=nonempty, help="cpu or cuda. Default: cuda where there is one.")
    return p


def settle(p, args):
    """Refuse flags that contradict each other or would do nothing, and fill in the defaults."""
    given = [name for name, value in vars(args).items() if value is not None and value is not False]

    def leave_out(flags, why):
        if found := [f"--{name.replace('_', '-')}" for name in flags if name in given]:
            p.error(f"{why}; leave out {', '.join(found)}")
    if not {"prompt", "perplexity", "plan", "save"} & set(given):
        p.error("nothing to do: give --prompt TEXT, --perplexity FILE, --plan or --save DIR")
    if [*(args.prompt or ()), args.perplexity, args.calibrate].count("-") > 1:
        p.error("standard input can be read once; give one -")
    if args.bases is not None:
        leave_out([*PLAN_FLAGS, "save"], "--bases brings its own plan")
    if args.compare:
        leave_out(["cache"], "--compare runs all three caches")
    if args.cache == "full" and args.save is None:
        leave_out([*PLAN_FLAGS, "bases"], "--cache full keeps everything")
    if args.cache != "bibranch" and not args.compare:
        leave_out(["window", "bits"] + ["sinks"] * (args.calibrate is None),
                  "only --cache bibranch has two branches, and only --calibrate leaves sinks out")
    if args.prompt is None and args.perplexity is None:
        leave_out(["compare", "cache", "window", "bits"],
                  "no cache is filled without --prompt or --perplexity")
    if args.perplexity is None:
        leave_out(["context", "max_tokens"], "nothing is scored without --perplexity")
    if args.prompt is None:
        leave_out(SPEAK_FLAGS, "nothing is said without --prompt")
    if args.max_new_tokens == 1:
        leave_out(["compile"], "the only new token comes with the prompt")
    if not args.temperature:
        leave_out(["top_p", "seed"], "nothing is drawn at temperature 0")
    if args.basis in ("svd", "norm"):
        leave_out(["calibrate"], f"--basis {args.basis} uses no text")
    if args.basis in ("asvd", "whitened") and args.calibrate is None:
        p.error(f"--basis {args.basis} needs --calibrate FILE")
    calibrated = args.calibrate is not None
    defaults = DEFAULTS | {"basis": "whitened" if calibrated else "svd",
                           "schedule": "uniform" if calibrated else "progressive"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args

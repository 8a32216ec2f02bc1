"""The command line: its flags, which of them can be combined, and how a command ends.

This module does not import torch, so --help and a mistyped flag are answered at once.
"""
import argparse
import difflib
import importlib
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUNDLED_TEXT = str(ROOT / "runtime" / "calibration.txt")
LOSS_WINDOWS, MOMENT_WINDOWS, CALIBRATION_CONTEXT = 48, 32, 1024      # of --calibrate
OWN_MODULES = {"lorc", "cache", "model", "theory", "runtime"}


def main(argv=None):
    """Run one command and return its exit status, which `run_command` describes."""
    with dispensable_stderr():
        parser = command_line()
        args = validate_flags(parser, parser.parse_args(argv))

        def work():
            from runtime.jobs import run
            return run(args)
        return run_command("lorc", work)


def bounds_main(argv=None):
    """The same for `python theory.py`, which prints the bounds beside the measured errors."""
    parser = Parser(
        prog="theory.py", allow_abbrev=False,
        description="Compare the bounds with the errors measured on a checkpoint's activations.")
    parser.add_argument("--model", default=str(ROOT / "tiny"), metavar="PATH",
                        help="Folder in Hugging Face layout, or a Hub id. Default: tiny/.")
    parser.add_argument("--kept", type=number_in(float, 0.01, 0.99, "fraction in [0.01, 0.99]"),
                        default=0.6, metavar="F", help="As in lorc.py. Default: 0.6.")
    parser.add_argument("--prompt", default="Once upon a time", metavar="TEXT",
                        help="Start of the text that the model generates and that is measured.")
    with dispensable_stderr():
        args = parser.parse_args(argv)

        def work():
            from runtime.bounds import run
            return run(args)
        return run_command("theory", work)


# How a command ends ------------------------------------------------------------------------------

def run_command(name, work):
    """Import what a command needs, call work(), and return the exit status.

    The status is the one that work() returns; 2, after one line on standard error, for an error
    that the user can correct; 130 after Ctrl-C; 141 if the reader of standard output has closed
    the pipe, as `| head` does. `name` begins the line. Any other exception is a fault of this
    program and is raised.
    """
    if message := import_packages():
        return print_error(name, message)
    import torch

    from runtime.distributed import process_group
    try:
        with torch.no_grad(), process_group():
            status = work()
        print(end="", flush=True)               # raises here, not at exit, if it cannot be written
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        discard_stdout()
        return 141
    except Exception as error:
        message = error_message(error)
        if message is None:
            raise
        if isinstance(error, OSError):
            discard_stdout()
        return print_error(name, message)


def import_packages():
    """Import everything that a command needs. Returns what failed in one line, or None.

    Ctrl-C ends the process directly meanwhile: an interrupt inside an extension module that is
    being initialised is not reliably reported as KeyboardInterrupt.
    """
    for package in ("torch", "safetensors", "tokenizers", "tqdm", "runtime.jobs"):
        try:
            with exit_on_interrupt():
                importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name.partition(".")[0] in OWN_MODULES:
                raise
            return missing_package(error)
        except (ImportError, MemoryError, OSError) as error:    # a library that does not fit, often
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            return (f"cannot import {package} ({reason}); either there is too little memory, or "
                    f"{install_command()} has to be run again")
    return None


@contextmanager
def exit_on_interrupt():
    """Exit with status 130 on Ctrl-C, unless it is ignored or this is not the main thread."""
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None):
        yield
        return
    with suppress(ValueError):                                          # not the main thread
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, before)


def missing_package(error):
    """The message for a ModuleNotFoundError."""
    return f"the package {error.name} is not installed; run {install_command()}"


def install_command():
    return f"pip install -r {os.path.relpath(ROOT / 'requirements.txt')}"


def error_message(error):
    """What to tell the user about an exception, or None if the user cannot correct its cause."""
    import torch

    from model import UserError
    if isinstance(error, UnicodeEncodeError):
        return (f"standard output takes only {error.encoding}, and the text has "
                f"{error.object[error.start]!a}; set PYTHONIOENCODING=utf-8")
    if isinstance(error, (UserError, OSError)):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name.partition(".")[0] not in OWN_MODULES:
        return missing_package(error)
    out_of_memory = (isinstance(error, (MemoryError, torch.OutOfMemoryError))
                     or isinstance(error, RuntimeError) and "allocate" in str(error))
    if out_of_memory:               # PyTorch raises RuntimeError when the CPU's memory is exhausted
        return ("there is not enough memory for this model, text and number of new tokens; "
                "ask for less")
    return None


def print_error(name, message):
    """Print one line on standard error. Returns the exit status 2."""
    print(f"{name}: {' '.join(message.split()):.400}", file=sys.stderr)
    return 2


def discard_stdout():
    """Send what is still buffered for standard output nowhere, so that exit does not fail on it."""
    with suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class DispensableStream:
    """A text stream whose failures to write are ignored."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            self.stream.write(text)
        except OSError:
            self.discard()
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.discard()

    def discard(self):
        """Send this and everything later to the null device; else exit would try again to write."""
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def dispensable_stderr():
    """Run a command whose standard error may be closed (2>&-) or full; its messages are then lost.

    A closed descriptor 2 is opened on the null device. Otherwise the next file to be opened would
    become descriptor 2, and messages of libraries would be written into it.
    """
    try:
        os.fstat(2)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != 2:
            os.dup2(null, 2)
            os.close(null)
    stream = sys.stderr or open(2, "w", closefd=False)
    with redirect_stderr(DispensableStream(stream)):
        yield


# Types of flags ----------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which reads -1e-1 and -inf as numbers."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        number = r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf(inity)?$|-nan$"
        self._negative_number_matcher = re.compile(number, re.IGNORECASE)

    def error(self, message):
        """Exit with status 2 after one line: what is wrong, and where to look."""
        if os.environ.get("RANK", "0") != "0":      # under torchrun only rank 0 prints the line
            time.sleep(1)
            self.exit(2)
        unknown = re.match(r"unrecognized arguments:.*?(--\w[\w-]*)", message)
        flags = [flag for action in self._actions for flag in action.option_strings]
        for flag in difflib.get_close_matches(unknown[1], flags, 1) if unknown else ():
            message += f"; did you mean {flag}?"
        self.exit(2, f"{Path(self.prog).stem}: {' '.join(message.split()):.400} (see --help)\n")


def number_in(kind, low, high, description):
    """An argparse type: a number of type `kind` from low to high."""
    def read(text):
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"should be a {description}, not {text!r:.40}")
    return read


def nonempty_text(text):
    """An argparse type: text that is not empty, as an unset variable of the shell would be."""
    if not text.strip():
        raise argparse.ArgumentTypeError("should not be empty")
    return text


count = number_in(int, 0, 10**9, "count up to 10^9")
positive = number_in(int, 1, 10**9, "positive count up to 10^9")
two_or_more = number_in(int, 2, 10**9, "count > 1")
fraction = number_in(float, 1e-6, 1, "fraction in (0, 1]")


# The flags ---------------------------------------------------------------------------------------

DEFAULTS = {"cache": "compressed", "kept": 0.6, "threshold": math.inf, "skip": 0, "split": 0.0,
            "sinks": 4, "window": 32, "bits": 16, "max_new_tokens": 128, "temperature": 0.0,
            "top_p": 1.0, "seed": 0}
SCHEDULE_FLAGS = ["d_min", "threshold", "schedule", "skip", "split"]
PLAN_FLAGS = ["kept", *SCHEDULE_FLAGS, "basis", "calibrate"]
GENERATION_FLAGS = ["max_new_tokens", "temperature", "top_p", "seed", "chat", "compile"]


def command_line():
    """The parser. A flag that is not given is None or False; `validate_flags` sets its default."""
    parser = Parser(
        prog="lorc.py", allow_abbrev=False,
        description="LoRC and CSKV: run a LLaMA model with a low-rank key-value cache.")
    parser.add_argument("--model", type=nonempty_text, default=str(ROOT / "tiny"), metavar="PATH",
                        help="Folder in Hugging Face layout, or the id of a model on the Hugging "
                             "Face Hub. Default: tiny/ beside lorc.py.")
    add_task_flags(parser.add_argument_group("what to do"))
    add_plan_flags(parser.add_argument_group("what is compressed"))
    add_cache_flags(parser.add_argument_group("the cache"))
    add_generation_flags(parser.add_argument_group("running"))
    return parser


def add_task_flags(group):
    flag = group.add_mutually_exclusive_group().add_argument
    flag("--prompt", action="append", metavar="TEXT",
         help="Continue this text. Can be repeated. - reads standard input.")
    flag("--perplexity", type=nonempty_text, metavar="FILE",
         help="Compute the perplexity of this text under the chosen cache and the full cache.")
    flag("--plan", action="store_true",
         help="Print the condition numbers (kappa, kappa~) and ranks of each layer and stop.")
    flag = group.add_argument
    flag("--compare", action="store_true",
         help="Run all three caches and print them side by side.")
    flag("--save", type=nonempty_text, metavar="DIR",
         help="Write the bases and the plan to DIR/bases.safetensors.")
    flag("--json", action="store_true", help="Print one JSON object instead of text and tables.")
    flag("--verbose", action="store_true",
         help="Also print the table of --plan, with the error of each layer on this text.")


def add_plan_flags(group):
    flag = group.add_mutually_exclusive_group().add_argument
    flag("--kept", type=fraction, metavar="F",
         help="rho: the fraction of a full cache's numbers that is kept. Default: 0.6.")
    flag("--d-min", type=positive, metavar="N",
         help="d_min in Eq. 13, instead of --kept. It is rounded as all ranks are.")
    flag = group.add_argument
    flag("--threshold", type=number_in(float, -math.inf, math.inf, "number"), metavar="F",
         help="Alg. 1, l. 8: do not compress layers whose ln kappa~ is above this. "
              "Default: no threshold.")
    flag("--schedule", choices=["progressive", "uniform"],
         help="How ranks depend on the layer. progressive: Eq. 13. uniform: the same rank in all "
              "layers. Default: progressive; uniform with --calibrate, unless --basis loss chooses "
              "the ranks.")
    flag("--skip", type=count, metavar="N",
         help="Do not compress the first N layers. Default: 0.")
    flag("--split", type=number_in(float, -1, 1, "number in [-1, 1]"), metavar="F",
         help="Move this fraction of d_max from the keys' rank to the values'. Default: 0.")
    flag("--basis", choices=["svd", "norm", "asvd", "whitened", "commuting", "loss"],
         help="How the bases are computed. svd: from the weights alone (LoRC). norm: from the "
              "weights, with that of the normalization before them. asvd, whitened: for the sizes, "
              "or the second moment E[xx^T], of the inputs x in the text of --calibrate. loss: for "
              "the least loss of the model on that text. commuting: keys are never rebuilt; "
              "--calibrate is optional. Default: svd; loss with --calibrate.")
    flag("--calibrate", type=nonempty_text, nargs="?", const=BUNDLED_TEXT, metavar="FILE",
         help="Compute the bases from the first windows of this text, of up to "
              f"{CALIBRATION_CONTEXT:,} tokens each: {LOSS_WINDOWS} for --basis loss, "
              f"{MOMENT_WINDOWS} for the others. "
              "Default without FILE: the text that comes with this program.")
    flag("--bases", type=nonempty_text, metavar="DIR",
         help="Use the bases and the plan that --save wrote.")


def add_cache_flags(group):
    flag = group.add_argument
    flag("--cache", choices=["full", "compressed", "bibranch"],
         help="full: every key and value. compressed: low-rank latents of all tokens (LoRC). "
              "bibranch: latents, with the first and the last tokens exact (CSKV). "
              "Default: compressed.")
    flag("--sinks", type=count, metavar="N",
         help="Number of first tokens that the bi-branch cache keeps exactly. "
              "--calibrate leaves them out. Default: 4.")
    flag("--window", type=count, metavar="N",
         help="Number of last tokens that the bi-branch cache keeps exactly. Default: 32.")
    flag("--bits", type=int, choices=[16, 4],
         help="Bits of each number in the bi-branch cache's latents; 16 stands for the model's "
              "dtype, whatever it is. Default: 16.")


def add_generation_flags(group):
    flag = group.add_argument
    flag("--max-new-tokens", type=positive, metavar="N", help="Default: 128.")
    flag("--temperature", type=number_in(float, 0, 1e3, "number >= 0"), metavar="F",
         help="0 always takes the most probable token. Default: 0.")
    flag("--top-p", type=fraction, metavar="F",
         help="Sample from the smallest set of tokens that has this probability. Default: 1.")
    flag("--seed", type=count, metavar="N", help="Seed of the sampling. Default: 0.")
    flag("--chat", action="store_true", help="Wrap the prompt in the model's own chat template.")
    flag("--compile", action="store_true",
         help="Compile the decode step, on CUDA into one graph. It starts slowly and then runs "
              "fast. A bi-branch cache decodes uncompiled until its window is full.")
    flag("--context", type=two_or_more, metavar="N",
         help="Window length for --perplexity. Default: the model's maximum.")
    flag("--max-tokens", type=two_or_more, metavar="N",
         help="Score only the first N tokens of the --perplexity text.")
    flag("--dtype", choices=["float32", "bfloat16", "float16"],
         help="Precision of the computation. Default: the checkpoint's on CUDA, float32 on a CPU.")
    flag("--device", type=nonempty_text, help="cpu or cuda. Default: cuda where there is one.")


# Which flags can be combined ---------------------------------------------------------------------

def validate_flags(parser, args):
    """Set every flag's default in args, and keep what the user gave in args.given.

    Exits with one line if two flags contradict each other or a flag would have no effect.
    """
    args.given = {name: value for name, value in vars(args).items()
                  if value is not None and value is not False
                  and value != parser.get_default(name)}
    calibrated = args.calibrate is not None
    uses_loss = args.basis == "loss" or args.basis is None and calibrated
    if not {"prompt", "perplexity", "plan", "save"} & set(args.given):
        parser.error("nothing to compare: give --prompt TEXT or --perplexity FILE" if args.compare
                     else "nothing to do: give --prompt TEXT, --perplexity FILE, --plan or "
                          "--save DIR")
    if [*(args.prompt or ()), args.perplexity, args.calibrate].count("-") > 1:
        parser.error("standard input can be read once; give one -")
    if args.basis in ("asvd", "whitened", "loss") and not calibrated:
        parser.error(f"--basis {args.basis} needs --calibrate")
    for names, reason in [*plan_conflicts(args, uses_loss), *cache_conflicts(args, uses_loss),
                          *task_conflicts(args)]:
        found = [f"--{name.replace('_', '-')}" for name in names if name in args.given]
        if found:
            parser.error(f"{reason}{' ' if reason.endswith(', or') else '; '}"
                         f"leave out {', '.join(found)}")
    defaults = DEFAULTS | {"basis": "loss" if calibrated else "svd",
                           "schedule": "uniform" if calibrated else "progressive"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def plan_conflicts(args, uses_loss):
    """(names of flags, why they cannot be given) for the flags that say what is compressed."""
    if args.bases is not None:
        yield [*PLAN_FLAGS, "save"], "--bases contains its own plan"
    if args.cache == "full" and args.save is None and not args.compare:
        yield [*PLAN_FLAGS, "bases", "verbose"], "--cache full compresses nothing"
    if args.basis in ("svd", "norm"):
        yield ["calibrate"], f"--basis {args.basis} uses no text"
    if uses_loss:
        yield SCHEDULE_FLAGS, ("--basis loss, the default with --calibrate, chooses the ranks "
                               "itself (--basis whitened does not)")
    if args.bits == 4 and args.kept == 1:
        yield ["bits"], "--bits 4 rounds latents, and --kept 1 makes none"


def cache_conflicts(args, uses_loss):
    """The same for the flags that say which cache is used and how."""
    if args.compare:
        yield ["cache"], "--compare runs all three caches"
    if args.prompt is None and args.perplexity is None:
        yield ["compare", "cache", "bits"], "no cache is filled without --prompt or --perplexity"
    if args.cache == "bibranch" or args.compare:
        return
    yield ["bits"], "only --cache bibranch has latents of 4 bits; add it, or"
    if not uses_loss:
        yield ["window"], "only --cache bibranch and --basis loss have a window; add one, or"
    if args.calibrate is None:
        yield ["sinks"], ("only --cache bibranch and --calibrate treat the first tokens "
                          "differently; add one, or")


def task_conflicts(args):
    """The same for the flags that say what is done."""
    if args.plan or args.json:
        yield ["verbose"], "--plan and --json contain the table"
    if args.perplexity is None:
        yield ["context", "max_tokens"], "nothing is scored without --perplexity"
    if args.prompt is None:
        yield GENERATION_FLAGS, "no text is generated without --prompt"
        if args.perplexity is None and not args.plan:
            yield ["verbose"], "--save alone prints no table (--plan does)"
    if args.max_new_tokens == 1:
        yield ["compile"], "the only new token is computed together with the prompt"
    if not args.temperature:
        yield ["top_p", "seed"], "nothing is sampled at temperature 0"

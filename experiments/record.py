"""Where a result comes from: every experiment writes its JSON through here."""
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def provenance(device, commit=None):
    """Device, versions, commit and command of this run. commit: where git is not at hand."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    words = [Path(w).name if Path(w).is_absolute() else w
             for before, w in zip(["", *sys.argv], sys.argv)
             if not {before, w} & {"--out", "--commit"}]      # where it went is not what it was
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit or git.stdout.strip() or "unknown",
            "command": shlex.join(["python", *words])}


def write(path, result):
    """Write one result as JSON, and show it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1), flush=True)

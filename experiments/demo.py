"""``make demo``: calibrate this machine, plan a small GPT for it, predict, train it on four MPI ranks, compare.

Every step is a command that anybody may type; the demo prints it before it runs it. The model reads bytes, and its
text is the source code that Python itself brings, so nothing is downloaded.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path("demo")
MODEL = "gpt:layers=4,hidden=192,heads=6,seq=128,vocab=256"
RANKS = 4
BATCH = 32
STEPS = 40
FRESH_SECONDS = 24 * 3600.0  # a machine file younger than this is used again


def main() -> int:
    """Run the commands one after another; the first that fails ends the demo with its exit code."""
    FOLDER.mkdir(exist_ok=True)
    machine, plan = FOLDER / "machine.json", FOLDER / "plan.json"
    commands = []
    if machine.exists() and time.time() - machine.stat().st_mtime < FRESH_SECONDS:
        say(f"{machine} was measured within a day and is used again; delete it to calibrate anew")
    else:
        commands.append(["calibrate", "--out", str(machine), "--budget", "120s", "--ranks", str(RANKS)])
    commands += [
        ["plan", MODEL, "--cluster", str(machine), "--batch", str(BATCH), "-o", str(plan)],
        [
            *("execute", str(plan), "--steps", str(STEPS)),
            *("--plot", str(FOLDER / "timeline.png"), "--trace", str(FOLDER / "trace.json")),
        ],
    ]
    for command in commands:
        say("$ meshwright " + " ".join(command))
        code = subprocess.call([sys.executable, "-m", "meshwright", *command], env=compiled_once())
        if code != 0:
            return code
    say(f"look at {FOLDER / 'timeline.png'}; open {FOLDER / 'trace.json'} at ui.perfetto.dev; the plan is {plan}")
    return 0


def compiled_once() -> dict[str, str]:
    """The environment, with a compilation cache inside the demo's folder so that a second run compiles nothing."""
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": str((FOLDER / "compiled").absolute())}


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""How long the command line takes to answer, against Python alone and against the imports that it cannot do without.

python            `python -c pass`
imports           `python -c "import sqlalchemy, psycopg2"`
embstore --help   needs neither
embstore status   needs both; on an embedded server that runs already

Each is a whole process, from start to exit, of this Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from statistics import median

from common import arguments, in_turns, ratio, seconds, server, show, show_ratio

from embstore.db import embedded


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, rounds=15).parse_args()
    commands = {
        "python": ["-c", "pass"],
        "imports": ["-c", "import sqlalchemy, psycopg2"],
        "embstore --help": ["-m", "embstore", "--help"],
        "embstore status": ["-m", "embstore", "status"],
    }
    with server() as settings:
        embedded.ensure_running(settings.home)
        environment = os.environ | {"EMBSTORE_HOME": str(settings.home)}
        environment.pop("DATABASE_URL", None)

        def run(command: list[str]) -> float:
            return seconds(
                lambda: subprocess.run(
                    [sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, check=True
                )
            )

        for command in commands.values():  # once unmeasured: the files come into memory, the byte code is made
            run(command)
        times = in_turns(options.rounds, {name: partial(run, command) for name, command in commands.items()})
    print(f"{options.rounds} processes of each in turns")
    show(times)
    show_ratio("seconds of embstore --help", median(times["embstore --help"]), "0.3 or less")
    show_ratio("embstore --help / python -c pass", ratio(times, "embstore --help", "python"), "no more than 10")
    show_ratio("embstore status / the imports alone", ratio(times, "embstore status", "imports"), "no more than 2")


if __name__ == "__main__":
    main()

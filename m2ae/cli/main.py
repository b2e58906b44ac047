"""The command `m2ae`: finds the subcommand, and turns what the user can mend into one line."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from m2ae import __version__
from m2ae.cli import demo, doctor, info, train
from m2ae.dataclass_io import hint

COMMANDS = {"demo": demo, "train": train, "info": info, "doctor": doctor}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that names the nearest command."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and a message of one line."""
        if "invalid choice" in message and "command" in message:
            word = message.split("'")[1]
            message = f"expected a command, got {word!r}; {hint(word, COMMANDS)}"
        self.exit(2, f"m2ae: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        Exit status: 0; 2 where the arguments, a file or a folder are not as expected; 130 if
        interrupted.
    """
    parser = Parser(prog="m2ae", description="Multimodal autoencoders on fused operators.")
    parser.add_argument("--version", action="version", version=f"m2ae {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, module in COMMANDS.items():
        doc = (module.__doc__ or "").split("\n")[0]
        module.add_arguments(commands.add_parser(name, help=doc, description=doc))
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except KeyboardInterrupt:
        print(f"m2ae {options.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError) as error:
        if not _is_for_the_user(error):
            raise
        print(f"m2ae {options.command}: {error}", file=sys.stderr)
        return 2


def _is_for_the_user(error: Exception) -> bool:
    # Our own refusals say what was expected; anything else is a fault that needs its traceback.
    return isinstance(error, OSError) or "expected" in str(error)

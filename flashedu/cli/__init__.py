"""The command line: `flashedu ladder`, `flashedu doctor`, `flashedu plan` and `flashedu bench`.

A wrong option gets one line on stderr and exit code 2. Slow imports wait until they are needed.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from flashedu import __version__
from flashedu.cli import bench, doctor, ladder, plan
from flashedu.cli.options import Group, Refused, Stopped, close, given
from flashedu.cli.output import ClosedPipe, print_what_the_encoding_lacks_as_ascii, write

OUT_OF_MEMORY = "flashedu: out of memory; a smaller --n needs less"

UsageError: type[Any] = typer.BadParameter.__mro__[1]  # click's, or the copy that typer brings

app = typer.Typer(
    cls=Group,
    name="flashedu",
    help="FlashAttention, rung by rung.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(ladder.ladder)
app.command()(doctor.doctor)
app.command()(plan.plan)
app.add_typer(bench.bench, name="bench")


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given[:] = sys.argv[1:] if args is None else args
    print_what_the_encoding_lacks_as_ascii()
    try:
        code = app(args=args, prog_name="flashedu", standalone_mode=False)
    except UsageError as error:
        return _complain(_one_line(error, given), 2)
    except Refused as error:
        return _complain(str(error), 2)
    except Stopped as error:
        return _complain(str(error), 1)
    except MemoryError:
        return _complain(OUT_OF_MEMORY, 1)
    except ImportError as error:  # such as Triton's, whose sentence says what to do
        return _complain(f"flashedu: {error}", 1)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch has no MemoryError on the CPU
            raise
        return _complain(OUT_OF_MEMORY, 1)
    except SystemExit:  # so rich and typer report a closed pipe while they print help
        return 141
    except ClosedPipe:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141  # 128 + SIGPIPE, as for other programs
    if code == 130:
        _complain("flashedu: stopped", 130)
    return code or 0


@app.callback(invoke_without_command=True)
def _flashedu(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        write(f"flashedu {__version__}\n")
        raise typer.Exit()
    if ctx.invoked_subcommand is None:
        write(ctx.get_help())  # typer has printed it already, if it uses rich


def _complain(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return code


def _one_line(error: Any, args: list[str]) -> str:
    """The message of click's exception, in the words of this course."""
    root = typer.main.get_command(app)
    ctx = error.ctx
    if ctx:
        command, params = ctx.command_path, ctx.command.params
    else:  # the parser found it, and does not say for which command
        command, sub = "flashedu", root
        for name in args:
            if name not in getattr(sub, "commands", {}):
                break
            command, sub = f"{command} {name}", sub.commands[name]  # type: ignore[attr-defined]
        params = sub.params
    kind = type(error).__name__
    if kind == "NoSuchOption":
        options = [name for param in params for name in (*param.opts, "--help")]
        nearest = close(error.option_name, options) or f"{command} --help lists the options"
        return f"{command}: no option {error.option_name}; {nearest}"
    if kind == "BadOptionUsage":
        if "does not take a value" in error.message:
            return f"{command}: {error.option_name} takes no value"
        asked = [param for param in params if error.option_name in param.opts]
        usual = [param.default for param in asked]
        named = any(param.metavar == "NAME_OR_PATH" for param in asked)
        example = "llama" if named else usual[0] if usual and usual[0] is not None else 1
        return f"{command}: {error.option_name} needs a value, as in {error.option_name} {example}"
    if isinstance(error, typer.BadParameter) and error.param is not None:
        return f"{command}: {error.param.opts[0]} {error.message}"
    message = error.format_message().rstrip(".")
    return f"{command}: {message[:1].lower()}{message[1:]}"

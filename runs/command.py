"""A command from its words to its exit status: whatever goes wrong becomes a sentence."""

import os
import signal
import sys
import traceback

from arguments import Usage, parse
from runs.files import Failure, is_out_of_memory, reason
from runs.group import Told, launched
from runs.signals import Interrupted, Stop

SMALLER = {  # what a command, by its task, can do with less
    None: "Try a smaller --batch-size or --image-size.",
    "predict": "Try --num-workers 1, or on a GPU --device cpu.",
}


def exit_status(main, argv=None):
    """Runs `main(arguments, stop)` with the arguments in `argv` [the command line's]; returns the exit status: 0, 1 for
    a failure, 2 for wrong usage, 130 and 143 when stopped."""
    argv = sys.argv[1:] if argv is None else argv
    size, rank = launched()
    several = size > 1
    who = f"[{rank}] " if several else ""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a class name that this terminal cannot show
            if several:  # torchrun's Python writes a line and its end apart, and others' lines come between them
                stream.reconfigure(line_buffering=True, write_through=False)
    stop = Stop()
    handlers = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    arguments = None
    try:
        arguments = parse(argv)
        main(arguments, stop)
        return 0
    except Usage as error:
        if rank == 0:
            print(f"error: {error} (see python main.py --help)", file=sys.stderr)
        return 2
    except Interrupted as error:
        for number in handlers:  # a further signal has nothing to add
            signal.signal(number, signal.SIG_IGN)
        if arguments and arguments.task:
            again = "The same command begins again"
        elif stop.runs_removed:
            again = "The same command without --overwrite resumes it"
        else:
            again = "The same command resumes it"
        if error.kept or rank == 0:
            print(f"\n{who}{error} {again}.", file=sys.stderr)
        return 128 + error.signal_number
    except Told:
        return 1
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments is None or arguments.debug:
            traceback.print_exc()
        else:
            print(f"{who}error: {explain(error, arguments, stop)}", file=sys.stderr)
        return 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def explain(error, arguments, stop):
    """An exception in words: what happened, where, and what to do."""
    if isinstance(error, Failure):
        text = str(error)
    elif is_out_of_memory(error):
        text = f"there is not enough memory. {SMALLER.get(arguments.task, 'Close other programs, and try again.')}"
    elif isinstance(error, OSError):
        text = f"{error.filename}: {reason(error)}." if error.filename else f"{reason(error)}."
    else:
        first = str(error).splitlines()[0] if str(error) else ""
        text = f"{type(error).__name__}: {first}\n(--debug shows where)"
        if arguments.compile:
            text += "\nIf torch.compile is what fails, train without --compile."
    if stop.runs_removed and "--overwrite" not in text:
        text += "\nWhat this command has trained is kept: repeat it without --overwrite to go on from there."
    return text

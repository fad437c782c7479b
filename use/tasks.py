"""What a command does with finished runs; each task imports only what it needs."""

from pathlib import Path

from runs.files import Failure
from runs.lock import lock


def do_task(arguments):
    """Does `arguments.task`: --list, --report, --predict, --export: what needs no training."""
    if arguments.task == "list":
        from reports.listing import list_runs

        list_runs(arguments.output_dir)
    elif arguments.task == "report":
        if not Path(arguments.output_dir).is_dir():
            raise Failure(f"{arguments.output_dir} does not exist: --report needs a folder with finished runs.")
        from reports.report import report

        with lock(arguments.output_dir):
            report(arguments.output_dir)
    elif arguments.task == "predict":
        from use.predict import predict

        predict(arguments)
    else:
        from use.export import export

        export(arguments)

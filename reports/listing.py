"""--list: what an output folder holds, a line a run. Needs neither PyTorch nor the data."""

import time
from pathlib import Path

from runs.files import Damaged, Failure, load_array, read_json, verify_archive
from runs.settings import RunRecord

FILES = ("run.json", "model.pt", "state.pt")  # a folder with one of them is a run's


def list_runs(output):
    """Prints a line for every run in the folder `output` and in its selection/: name, epochs done, accuracy, when it
    was last written, on what, and whether it is unfinished or damaged. Raises Failure where there is no such folder."""
    output = Path(output)
    if not output.is_dir():
        raise Failure(f"{output} does not exist. Choose another --output-dir, or train something first.")
    folders = [each for top in (output, output / "selection") for each in sorted(top.glob("*/"))]
    folders = [each for each in folders if any((each / name).is_file() for name in FILES)]
    if not folders:
        print(f"{output} holds no runs.")
        return
    rows = [("run", "epochs", "accuracy", "last written", "on")]
    rows += [(each.relative_to(output).as_posix(), *_describe(each)) for each in folders]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _describe(folder):
    """What to say of the run in `folder`: epochs, accuracy, time, device."""
    written = max((folder / name).stat().st_mtime for name in FILES if (folder / name).is_file())
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(written))
    try:
        try:
            record = _verified_record(folder)
        except Failure:
            record = _verified_record(folder)  # the run may have ended in between, with other files
    except Failure as error:
        return "", "", written, f"DAMAGED: {error}"
    epochs = f"{record.epochs_done} of {record.settings.epochs}"
    made = record.environment
    place = f"{made.get('device', 'unknown')}, {made.get('precision', 'unknown')}"
    if not (folder / "model.pt").is_file():
        return epochs, "unfinished", written, place
    if record.settings.val_fraction:
        return epochs, f"{record.val_accuracy:.4f} (validation)", written, place
    return epochs, f"{record.accuracy:.4f}", written, place


def _verified_record(folder):
    """The content of a run's run.json, once the files beside it are known to be intact."""
    record = read_json(folder / "run.json", RunRecord)
    for name in ("model.pt", "state.pt"):
        if (folder / name).is_file():
            verify_archive(folder / name)
    if (folder / "model.pt").is_file():
        result = record.val_accuracy if record.settings.val_fraction else record.accuracy
        if not record.finished or result is None:
            raise Damaged(f"{folder / 'run.json'} does not belong to the finished model.pt beside it.")
        if record.test_logits_sha256:
            load_array(folder / "test_logits.npy", record.test_logits_sha256)
    return record

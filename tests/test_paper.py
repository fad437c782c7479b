"""A part of the training images, and classes that students never see: through the command line and by hand."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT, leave_out

import data
import distill
import models
import train
from arguments import parse
from data import Views
from distill import omitted_bias
from reports import omitted
from reports.comparison import Comparison
from runs import plan
from runs.command import exit_status
from runs.files import Failure
from runs.machine import Machine
from runs.run import Run
from runs.settings import OPTIONAL, Settings, differences, run_name


@pytest.fixture(scope="module")
def without_red(tmp_path_factory, finished, flags):
    """(output folder with the students of half of the images of blue and green, the steps' indices by run name)."""
    import main

    output, met, batch = tmp_path_factory.mktemp("red") / "out", [], Views.batch
    shutil.copytree(finished, output)

    def watched(self, epoch, indices):
        met.append(indices)
        return batch(self, epoch, indices)

    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch)
        patch.setattr(Views, "batch", watched)
        words = (*flags, "--output-dir", output, "--train-fraction", 0.5, "--omit-class", "red", "--seeds", 2)
        assert exit_status(main.main, [str(word) for word in words]) == 0
    return output, torch.cat(met)


# Which images --------------------------------------------------------------------------------------------------------


PART = [4, 6, 9, 13, 17, 22, 23, 30, 33, 38, 43, 45]  # a quarter of 3 times 16 images, in every version


def test_a_part_is_stratified_fixed_and_within_a_larger_one(images):
    loaded = data.load("folder", data_dir=images, image_size=16)
    parts = {fraction: loaded.transfer_set(fraction) for fraction in (0.01, 0.25, 0.5, 1.0)}
    for fraction, count in ((0.01, 1), (0.25, 4), (0.5, 8), (1.0, 16)):
        assert loaded.train_labels[parts[fraction]].bincount().tolist() == [count] * 3
    sets = [set(part.tolist()) for part in parts.values()]
    assert sets[0] < sets[1] < sets[2] < sets[3] == set(range(48))
    assert torch.equal(parts[1.0], torch.arange(48)) and parts[0.25].tolist() == PART
    some = loaded.transfer_set(0.5, ["green"])
    assert set(some.tolist()) == {i for i in sets[2] if loaded.classes[loaded.train_labels[i]] != "green"}


def test_the_omitted_class_and_the_other_part_are_never_met(without_red, images):
    """Neither by the students nor by the teacher that is asked for their soft targets."""
    output, met = without_red
    loaded = data.load("folder", data_dir=images, image_size=16)
    wanted = set(loaded.transfer_set(0.5, ["red"]).tolist())
    assert set(met.tolist()) == wanted and len(wanted) == 16
    assert "red" not in {loaded.classes[loaded.train_labels[i]] for i in wanted}
    shapes = [np.load(path)["logits"].shape for path in sorted((output / "targets").glob("*/*.npz"))]
    assert sorted(shapes) == [(16, 3)] * 2 + [(48, 3)] * 2  # of two epochs each: these students', and `finished`


def test_both_students_begin_alike_on_the_same_images(cli, flags, without_red, tmp_path):
    """At alpha 0 the distilled student is the baseline, bit for bit, on a part of the images, too."""
    output = shutil.copytree(without_red[0], tmp_path / "out")
    words = ("--train-fraction", 0.5, "--omit-class", "red", "--alpha", 0)
    assert cli(*flags, "--output-dir", output, *words).status == 0
    one, other = (
        models.load(output / f"{name}-f0.5-without-red-s0" / "model.pt").state_dict()
        for name in ("kd-T4-a0", "baseline")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_soft_targets_of_a_part_are_rows_of_those_of_all(finished, images, tmp_path):
    """An image's view is the same whichever part it is in, and so is what the teacher says of it."""
    loaded = data.load("folder", data_dir=images, image_size=16)
    views = Views(loaded.train_images, loaded.mean, loaded.std)
    teacher = models.load(finished / "teacher-s0" / "model.pt")
    machine = Machine(torch.device("cpu"))
    part = loaded.transfer_set(0.5, ["red"])
    every, some = (
        distill.SoftTargets(teacher, "x", loaded.digest, views, tmp_path, machine, transfer_set=each).epoch(1)
        for each in (None, part)
    )
    torch.testing.assert_close(some[part], every[part], atol=2e-3, rtol=0)
    others = torch.ones(48, dtype=torch.bool)
    others[part] = False
    assert some[others].isnan().all() and not every.isnan().any()


# The bias of a class that was not shown -------------------------------------------------------------------------------


def test_the_bias_by_hand():
    """Of five images the third class lacks 1, 2, 4, 7 and 8: it is chosen for two of them with 3."""
    logits = torch.tensor([[5.0, 0, 4], [0, 5, 3], [5, 5, 1], [7, 0, 0], [0, 9, 1]])
    assert omitted_bias(logits, [2], 2) == 3.0
    assert ((logits + torch.tensor([0, 0, 3.0])).argmax(1) == 2).sum() == 2
    assert omitted_bias(logits, [0, 2], 3) == 1.0  # the likelier of two counts: both lack -7, -5, 0, 2 and 8


def test_the_bias_needs_no_float64_of_the_device():
    """MPS has none: here a type of tensor that leaves the CPU only when it is told to."""

    class Elsewhere(torch.Tensor):
        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    assert omitted_bias(torch.tensor([[5.0, 0, 4], [0, 5, 3]]).as_subclass(Elsewhere), [2], 1) == 1.5


def test_the_report_adds_each_runs_bias(without_red, capsys):
    output, _ = without_red
    comparison = Comparison(
        output, json.loads((output / "comparison.json").read_text())["kd"][0] | {"shared": (0.5, ("red",), None)}
    )
    labels = comparison.labels
    for role, entry in (("kd-T4-a0.1", comparison.kd[0]), ("baseline", comparison.baseline)):
        given = entry["omitted"]
        for seed in (0, 1):
            folder = output / f"{role}-f0.5-without-red-s{seed}"
            logits, bias = (
                np.load(folder / "test_logits.npy"),
                json.loads((folder / "run.json").read_text())["omitted_bias"],
            )
            shifted = logits + np.array([0, 0, bias])
            assert given["bias"][seed] == bias and given["classes"] == ["red"]
            assert given["accuracies"][seed] == (logits[labels == 2].argmax(1) == 2).mean()
            assert given["corrected_accuracies"][seed] == (shifted[labels == 2].argmax(1) == 2).mean()
            assert given["corrected_accuracies_on_all"][seed] == (shifted.argmax(1) == labels).mean()
    head, *rows = omitted.rows(comparison)
    assert head[1:] == ("on these", "std", "corrected", "std", "all, corr.", "bias")
    for (_, *cells), (_, entry) in zip(rows, comparison.students, strict=True):
        given = entry["omitted"]
        pairs = [(np.mean(each), np.std(each, ddof=1)) for each in (given["accuracies"], given["corrected_accuracies"])]
        means = *pairs[0], *pairs[1], np.mean(given["corrected_accuracies_on_all"]), np.mean(given["bias"])
        assert [float(cell) for cell in cells] == pytest.approx(means, abs=0.0051) and pairs[0] != pairs[1]
        assert float(cells[4]) == pytest.approx(means[4], abs=5e-5)


def test_several_omitted_classes_all_get_the_bias(monkeypatch):
    """With 2 added to the first and the third class, all images of these are found, not only one of c; b's stays."""
    logits = np.array([[0, 1, 0], [0, 1, 0.5], [0, 1, 2], [0, 5, 0]])
    run = SimpleNamespace(settings=SimpleNamespace(omit_class=("a", "c")), omitted_bias=2.0)
    found = omitted.omitted_classes([run], [logits], np.array([0, 2, 2, 1]), ["a", "b", "c"])["omitted"]
    assert found["accuracies"] == [1 / 3] and found["corrected_accuracies"] == found["corrected_accuracies_on_all"] == [
        1
    ]
    lacking = torch.tensor([[5.0, 0, 4], [0, 5, 3], [5, 5, 1], [7, 0, 0], [0, 9, 1]])  # as above
    monkeypatch.setattr(train, "evaluate", lambda *_: lacking)
    loaded = SimpleNamespace(classes=["a", "b", "c"], train_labels=torch.tensor([0, 0, 2, 1, 1]))
    loaded = SimpleNamespace(**vars(loaded), train_images=None, mean=None, std=None)
    assert train.bias_of_omitted(None, loaded, ("a", "c")) == 1.0


def test_the_bias_of_a_run_is_found_on_the_training_images(without_red, images):
    output, _ = without_red
    loaded = data.load("folder", data_dir=images, image_size=16)
    network = models.load(output / "kd-T4-a0.1-f0.5-without-red-s1" / "model.pt")
    with torch.inference_mode():
        logits = network(network.normalize(loaded.train_images))
    bias = json.loads((output / "kd-T4-a0.1-f0.5-without-red-s1" / "run.json").read_text())["omitted_bias"]
    assert ((logits + torch.tensor([0, 0, bias])).argmax(1) == 2).sum() == 16


def test_the_tables_of_runs_say_what_is_special_of_them(without_red):
    output, _ = without_red
    rows = {row["run"]: row for row in csv.DictReader((output / "comparison.csv").open())}
    row, teacher = rows["kd-T4-a0.1-f0.5-without-red-s1"], rows["teacher-s0"]
    assert (row["loss"], row["network"], row["train_fraction"], row["omit_class"]) == ("", "", "0.5", "red")
    assert (teacher["train_fraction"], teacher["omit_class"]) == ("1.0", "")
    text = (output / "report.html").read_text(encoding="utf-8")
    assert "<td>0.5</td><td>red</td>" in text


def test_every_table_of_the_page_has_its_own_note(without_red):
    tables = (without_red[0] / "report.html").read_text(encoding="utf-8").split("<h2>")[1:]
    notes = {part.split("</h2>")[0]: "".join(re.findall('<p class="note">(.*?)</p>', part, re.S)) for part in tables}
    for title, begins in (
        ("Test accuracy", "agreement: same class"), ("Fidelity to the teacher", "KL: from teacher to student in nats"),
        ("Not shown to students", "accuracy on test images of red; corrected: "), ("What it costs", "MB: of model.pt"),
        ("Accuracy by class", ""), ("Runs", ""),
    ):  # fmt: skip
        assert notes[title].startswith(begins) and bool(notes[title]) == bool(begins), title
    assert "all, corr.: accuracy on all test images" in notes["Not shown to students"]


# Runs and comparisons ------------------------------------------------------------------------------------------------


def test_runs_of_all_and_of_a_part_live_in_one_folder_and_are_not_mixed(cli, flags, without_red, finished, tmp_path):
    output = Path(shutil.copytree(without_red[0], tmp_path / "out"))
    assert "Omitted: red" in cli("--report", "--output-dir", output).out  # of what was asked last
    assert cli(*flags, "--output-dir", output).status == 0
    plain = json.loads((output / "comparison.json").read_text())
    assert plain["kd"][0]["seeds"] == [0] and "omitted" not in plain["baseline"]
    assert plain["kd"][0]["accuracies"] == json.loads((finished / "comparison.json").read_text())["kd"][0]["accuracies"]
    assert "train_fraction" not in plain["settings"] and len(plain["kd"]) == 1


def test_what_is_as_ever_is_recorded_as_ever(tmp_path):
    """So that runs of earlier versions stay what they are."""
    common = {"data": "d", "epochs": 1, "batch_size": 2, "learning_rate": 0.1, "weight_decay": 0.0, "seed": 0}
    plain = Settings("baseline", **common, image_size=16).as_dict()
    assert not {"train_fraction", "omit_class"} & plain.keys()
    part = Settings("baseline", **common, image_size=16, train_fraction=0.1, omit_class=("red",)).as_dict()
    run = Run(tmp_path, Settings("baseline", **common, image_size=16))
    run.refuse_other_settings(plain)
    for found, wanted, fraction in ((plain, part, "1.0 instead of 0.1"), (part, plain, "0.1 instead of 1.0")):
        phrases = " ".join(differences(OPTIONAL | found, OPTIONAL | wanted))
        assert f"train fraction {fraction}" in phrases and "omit class" in phrases
    with pytest.raises(Failure, match="train fraction 0.1 instead of 1.0"):
        run.refuse_other_settings(part)


def test_omitted_classes_are_the_same_in_any_order():
    loaded = SimpleNamespace(classes=["blue", "green", "red"])
    for words in (["red", "blue", "red"], ["blue", "red"]):
        assert plan.omitted(parse(["--omit-class", *words]), loaded) == ("blue", "red")


def test_names_are_safe_for_files():
    assert run_name("kd", 4.0, 0.9, 0, shared=(0.03, (), None)) == "kd-T4-a0.9-f0.03-s0"
    assert run_name("baseline", None, None, 2, None, (1.0, ("a/b", "$5 $10"), None)) == "baseline-without-a_b-_5_10-s2"


def test_many_omitted_classes_make_a_short_name():
    many = tuple(f"class {number}" for number in range(25))
    names = [run_name("kd", 4.0, 0.9, 0, shared=(1.0, omitted, None)) for omitted in (many, many[1:], many[:3])]
    assert re.fullmatch("kd-T4-a0.9-without-25-classes-[0-9a-f]{8}-s0", names[0])
    assert "-without-24-classes-" in names[1] and names[1].split("-")[-2] != names[0].split("-")[-2]
    assert names[2] == "kd-T4-a0.9-without-class_0-class_1-class_2-s0"
    assert len(run_name("baseline", None, None, 0, shared=(1.0, ("猫" * 90,), None)).encode()) < 60


def test_a_sweep_on_a_part_is_judged_on_a_part_of_that_part(cli, flags, finished, tmp_path, monkeypatch):
    import train

    output, judged, validate = Path(shutil.copytree(finished, tmp_path / "out")), [], train.validate

    def watched(network, loaded, indices):
        judged.append(indices)
        return validate(network, loaded, indices)

    monkeypatch.setattr(train, "validate", watched)
    words = ("--alpha", 0.1, 0.9, "--val-fraction", 0.25, "--train-fraction", 0.5, "--omit-class", "red", "--epochs", 1)
    got = cli(*flags, "--output-dir", output, *words)
    assert got.status == 0 and f"judged on {len(judged[0])} of the 16 training images that students see" in got.out
    assert 2 <= len(judged[0]) <= 8 and all(torch.equal(each, judged[0]) for each in judged[:3])
    assert [len(each) for each in judged[3:]] == [0] * 2
    best = json.loads((output / "comparison.json").read_text())
    assert len(best["selection"]) == 3 and best["settings"]["train_fraction"] == 0.5


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--omit-class", "pink"), "no class 'pink' to omit. The classes are: blue, green, red."),
        (("--omit-class", *CLASSES[:2]), "two classes or more"),
        (("--omit-class", "blue", "--omit-class", "red"), "two classes or more"),
    ],
)
def test_classes_that_cannot_be_omitted(cli, flags, finished, words, told):
    got = cli(*flags, "--output-dir", finished, *words)
    assert got.status == 1 and told in got.err and len(got.err.splitlines()) == 1


def test_the_papers_experiments_become_one_table(flags, finished, tmp_path, monkeypatch, capsys):
    """benchmarks/paper.py, its commands run in this process."""
    import paper

    import main

    output = Path(shutil.copytree(finished, tmp_path / "out"))

    class Done:
        def __init__(self, words):
            self.returncode = exit_status(main.main, words[2:])

    monkeypatch.setattr("commands.subprocess.run", Done)
    flags = [str(word) for word in flags]
    place = flags.index("--epochs")
    rest = ["--seeds", "2", "--epochs", "1", "--omit", "red", "--output-dir", str(output), "--results", str(tmp_path)]
    words = ["paper.py", *rest, *flags[:4], "--only", "10% of the images", "without red", "--", *flags[4:place]]
    monkeypatch.setattr(sys, "argv", [*words, *flags[place + 2 :]])
    paper.main()
    table = capsys.readouterr().out
    found = json.loads((tmp_path / "paper.json").read_text())["experiments"]
    assert [*found] == ["10% of the images", "without red"]
    assert found["10% of the images"]["rows"][0]["epochs"] == 3  # a quarter of the steps of one epoch of all
    whats = [row["what"] for row in found["without red"]["rows"]]
    assert len(whats) == 4 and "accuracy on red, bias corrected" in whats
    row = found["without red"]["rows"][2]
    kept = json.loads((output / "comparison.json").read_text())
    assert row["distilled"] == pytest.approx(np.mean(kept["kd"][0]["omitted"]["corrected_accuracies"]))
    assert table.count("| without red |") == 4 and "| 10% of the images | test accuracy" in table
    assert len((tmp_path / "paper.csv").read_text().splitlines()) == 1 + 5
    teacher = json.loads((output / "teacher-s0" / "run.json").read_text())["weights_sha256"]
    assert {row["teacher_sha256"] for each in found.values() for row in each["rows"]} == {teacher[:12]}


def test_a_loss_is_compared_over_the_seeds_that_both_have(finished):
    """Plain distillation has five seeds, the loss three of them and another: means and deviations are of the three, as
    the interval is."""
    import paper

    comparison = json.loads((finished / "comparison.json").read_text())
    accuracies, seeds = [0.1, 0.2, 0.4, 0.9, 0.9], [0, 1, 2, 3, 4]
    plain = comparison["kd"][0] | {"seeds": seeds, "accuracies": accuracies, "mean": 0.5, "std": 0.4}
    loss = plain | {"loss": "dkd", "seeds": [0, 1, 2, 7], "accuracies": [0.3, 0.5, 0.4, 0.8], "mean": 0.5}
    test = {"seeds": seeds[:3], "mean": 50 / 3, "ci95": [0, 1], "p_value": 0.5}
    comparison["kd"] = [loss, plain | {"first_over_this": test}]
    assert paper.rows("DKD", comparison)[0]["p_value"] is None  # McNemar's, of one pair, is of these two networks
    row = paper.rows("DKD", comparison)[1]
    assert row["p_value"] == 0.5
    assert row["what"] == "test accuracy, over plain distillation" and row["n"] == 3
    assert (row["distilled"], row["other"]) == pytest.approx((0.4, 0.7 / 3))
    assert 100 * (row["distilled"] - row["other"]) == pytest.approx(row["mean"])
    assert row["other_std"] == pytest.approx(np.std(accuracies[:3], ddof=1))


def experiment(teacher, n):
    row = {"n": n, "teacher_sha256": teacher, "teacher": 0.9, "experiment": "all", "what": "test accuracy", "epochs": 8}
    return {"rows": [row]}


def test_the_papers_experiments_are_of_one_teacher_and_folder(tmp_path):
    import paper

    path, done = tmp_path / "paper.json", {"all": experiment("a" * 12, 3)}
    settings = {"output_dir": "outputs", "padding": 4}
    assert paper.read(path, settings) == {}
    path.write_text(json.dumps({"settings": settings, "experiments": done}))
    assert paper.read(path, settings) == done
    for other in ({"output_dir": "outputs/two"}, {"padding": 2}):
        with pytest.raises(SystemExit, match="is of other settings: {'padding': 4, 'output_dir': 'outputs'}"):
            paper.read(path, settings | other)
    path.write_text(json.dumps({"settings": {"output_dir": "outputs"}, "experiments": done}))  # before it was recorded
    assert paper.read(path, settings) == done
    paper.same_teacher(path, done, experiment("a" * 12, 5)["rows"])
    with pytest.raises(SystemExit, match=f"'all' in .* is of another teacher, {'a' * 12}, not {'b' * 12}"):
        paper.same_teacher(path, done, experiment("b" * 12, 3)["rows"])


def test_seeds_of_one_experiment_are_added_and_never_lost(tmp_path, monkeypatch, capsys):
    import paper

    asked = []

    def seeds(words):
        return int(words[words.index("--seeds") + 1])

    monkeypatch.setattr("commands.subprocess.run", lambda words: asked.append(words) or Mock(returncode=0))
    monkeypatch.setattr(paper, "rows", lambda name, comparison: experiment("a" * 12, seeds(asked[-1]))["rows"])
    monkeypatch.setattr(paper.tables, "paper", lambda path: "")
    (tmp_path / "comparison.json").write_text('{"environment": {}}')
    words = ["paper.py", "--results", str(tmp_path), "--output-dir", str(tmp_path), "--processes", "2"]
    last = "logit standardisation at T = 4"
    for more in (["--only", last, "DKD"], ["--only", last, "--seeds", "5"], ["--only", "DKD", last]):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        paper.main()
    assert [(seeds(each), each[-1].rpartition(":")[2]) for each in asked] == [
        (3, "dkd"), (3, "standardised"), (5, "standardised"), (3, "dkd"), (5, "standardised"),
    ]  # fmt: skip
    assert all(each[each.index("--padding") + 1] == "4" for each in asked)
    assert all(each[each.index("--nproc-per-node") + 1] == "2" for each in asked)


def test_the_table_has_each_rows_seeds_and_bears_rows_without_an_interval(tmp_path, monkeypatch):
    import tables

    (tmp_path / "paper.csv").write_text(  # as the first version wrote it, without teacher_sha256
        "experiment,what,epochs,n,teacher,distilled,distilled_std,other,other_std,mean,low,high,p_value\n"
        "all,accuracy,8,3,0.9267,0.91,0.002,0.9,0.003,1.0,0.5,1.5,0.01\n"
        "no labels,accuracy,8,3,0.9267,0.91,0.002,0.9,0.003,1.0,0.1,1.9,0.04\n"
        "a tenth,accuracy,8,3,0.9267,0.91,0.002,0.9,0.003,1.0,0.2,1.8,0.03\n"
        "DKD,accuracy,8,1,0.9267,0.91,,0.9,,1.0,,,\n"
    )
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = tables.paper()
    assert "| all | accuracy | 8 | 3 | 0.9100 ± 0.0020 | 0.9000 ± 0.0030 | **+1.00 (+0.50 to +1.50)** |" in text
    assert "| DKD | accuracy | 8 | 1 | 0.9100 | 0.9000 | +1.00 |" in text and "teacher 0.9267." in text
    assert text.count("**") == 2 and "for all 3 together" in text  # 3 x 0.01 < 0.05, but 2 x 0.03 and so 0.04 are not


def test_a_benchmark_prints_what_it_runs_as_one_would_type_it(monkeypatch, capsys):
    import commands

    run = Mock(return_value=Mock(returncode=0))
    monkeypatch.setattr(commands.subprocess, "run", run)
    monkeypatch.chdir(ROOT)
    words = ["--loss", str(ROOT / "examples" / "dkd.py:dkd"), "--output-dir", f"/mnt{ROOT}/two words"]
    told = commands.run("main.py", *words, processes=2)
    assert told == (
        "torchrun --standalone --nproc-per-node 2 main.py --loss examples/dkd.py:dkd "
        f"--output-dir '/mnt{ROOT}/two words'"
    )
    assert capsys.readouterr().out == f"\n$ {told}\n"
    (started,), _ = run.call_args
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert started == [*launcher, str(ROOT / "main.py"), *words]
    monkeypatch.chdir(ROOT.parent)  # from elsewhere the printed command names the program there
    run.return_value.returncode = 3
    with pytest.raises(SystemExit) as ended:
        commands.run("main.py", "--demo")
    assert capsys.readouterr().out == f"\n$ python {ROOT.name}/main.py --demo\n"
    assert ended.value.code == 3 and run.call_args[0][0] == [sys.executable, str(ROOT / "main.py"), "--demo"]

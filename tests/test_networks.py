"""Networks of the user's own: trained, resumed, compared, saved and loaded, as students and as teachers."""

import json
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT, leave_out

import data
import models
import train
from arguments import parse
from data import Views
from reports import figures
from reports.comparison import Comparison
from runs.code import CODE
from runs.command import exit_status
from runs.files import Failure
from runs.group import Group
from runs.hooks import Hook, Hooks
from runs.machine import Machine
from runs.progress import Options
from runs.run import Run
from runs.settings import Settings
from runs.signals import Interrupted, Stop
from runs.streams import stream
from runs.teachers import find_teachers
from runs.trial import try_network

NETS = """
import torch
from torch import nn


def tiny(classes):
    layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(392, classes))


shared = nn.Linear(768, 3)


def common(classes):
    return nn.Sequential(nn.Flatten(), shared)


class Masked(nn.Sequential):
    def __init__(self, classes):
        super().__init__(nn.Flatten(), nn.Linear(768, classes))
        self.register_buffer("mask", torch.rand(768), persistent=False)


def loaded(classes):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, classes))
    network[2].requires_grad_(False).weight.fill_(0.25)  # as weights that were trained before
    return network
"""

DEEP = """
import random

import numpy
from torch import nn


class f(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.flat, self.a, self.b = nn.Flatten(), nn.Linear(768, classes), nn.Linear(768, classes)
        self.scale = 1 + random.random()

    def forward(self, x):
        x = self.flat(x)
        skipped = self.training and numpy.random.rand() < 0.5
        return self.a(x) if skipped else self.a(x) + self.scale * self.b(x)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory, finished, flags, file):
    """An output folder with a teacher and students of the user's own, beside the program's; not to be changed."""
    import main

    output = tmp_path_factory.mktemp("own") / "out"
    shutil.copytree(finished, output)
    network = ("--teacher-network", f"{file}:loaded")
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch)
        for more in (("--train-teacher", *network), (*network, "--student", f"{file}:tiny")):
            assert exit_status(main.main, [str(word) for word in (*flags, "--output-dir", output, *more)]) == 0
    return output


def hook(path, name, option="--student"):
    return Hook(option, path, name, path.read_bytes())


def load_tiny(path, file):
    return models.load(path / "model.pt", network=hook(file, "tiny").loaded)


# Training and comparing ----------------------------------------------------------------------------------------------


def test_names_costs_and_comparison(own, finished):
    names = {path.parent.name for path in own.glob("*/model.pt")} - {path.parent.name for path in finished.glob("*/*")}
    assert names == {"teacher-loaded-s0", "kd-tiny-T4-a0.1-s0", "baseline-tiny-s0"}
    found = json.loads((own / "comparison.json").read_text())
    assert found["settings"]["network"] == "tiny" and found["settings"]["network_file"] == "nets.py"
    assert found["student"]["parameters"] == 8 * 3 * 9 + 8 + 16 + 392 * 3 + 3
    assert found["student"]["macs"] == 49 * 8 * 3 * 9 + 392 * 3
    assert (found["teacher"]["parameters"], found["teacher"]["macs"]) == (48 * 5 + 5 + 5 * 3 + 3, 48 * 5 + 5 * 3)
    assert found["student"]["cost"]["fp32"]["milliseconds"] > 0
    teacher = json.loads((own / "teacher-loaded-s0" / "run.json").read_text())
    assert found["settings"]["teacher"] == teacher["weights_sha256"]
    assert teacher["settings"]["learning_rate"] == 0.1 * 16 / 128


def test_both_students_begin_with_the_same_weights_drawn_under_their_seed(file):
    function = hook(file, "tiny").loaded
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    digests = [
        models.digest(models.build(function, role, 3, seed).state_dict())
        for role, seed in (("student", 0), ("student", 0), ("student", 1), ("teacher", 0))
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 3
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_stream_seeds_all_global_generators_and_leaves_them_as_they_were():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    with stream("one"):
        first = draw()
    with stream("afterwards"):
        draw()
        with stream("one"):
            again = draw()
        inside = draw()
    with stream("afterwards"):
        draw()
        assert draw() == inside
    with stream("two"):
        other = draw()
    assert first == again and not {*first} & {*other}


def test_what_a_network_draws_from_any_global_generator_is_a_function_of_the_step(cli, flags, finished, tmp_path):
    """Stochastic depth as many repositories draw it: at alpha 0 the distilled student still is the baseline."""
    path, output = tmp_path / "deep.py", tmp_path / "out"
    path.write_text(DEEP)
    shutil.copytree(finished, output)
    got = cli(*flags, "--output-dir", output, "--alpha", 0, "--student", f"{path}:f")
    assert got.status == 0, got
    digests = [json.loads((output / name / "run.json").read_text())["weights_sha256"]
               for name in ("kd-f-T4-a0-s0", "baseline-f-s0")]  # fmt: skip
    assert digests[0] == digests[1]


def test_layers_that_several_calls_share_are_not_trained_by_several_runs(file):
    function = hook(file, "common").loaded  # as in one command; another command loads the file again
    for later in (function, hook(file, "common").loaded):
        one = models.build(function, "student", 3, 0)
        before = models.digest(one.state_dict())
        one(torch.randn(4, 3, 16, 16)).square().mean().backward()
        one.network[1].weight.data -= 0.1 * one.network[1].weight.grad  # a step of training
        again = models.build(later, "student", 3, 0)
        assert models.digest(again.state_dict()) == before != models.digest(one.state_dict())


def test_what_is_drawn_outside_the_state_dict_is_the_runs_when_it_is_loaded(file, tmp_path):
    function = hook(file, "Masked").loaded
    for seed in (0, 3):
        network = models.build(function, "student", 3, seed)
        about = {"classes": CLASSES, "image_size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3, "accuracy": 0.5}
        models.save(tmp_path / "model.pt", network, "student", settings={"role": "kd", "seed": seed}, **about)
        kept = models.load(tmp_path / "model.pt", network=function)
        assert "network.mask" not in network.state_dict() and torch.equal(kept.network.mask, network.network.mask)


def test_weights_that_the_function_loads_are_kept_and_frozen_ones_stay(own, file):
    network = models.load(own / "teacher-loaded-s0" / "model.pt", network=hook(file, "loaded").loaded)
    assert (network.network[2].weight == 0.25).all() and not network.network[4].weight.eq(0).all()


@pytest.fixture(scope="module")
def small(images):
    return data.load("folder", data_dir=images, image_size=16)


def tiny_run(small, folder, file, stop=None, epochs=2):
    found = hook(file, "tiny")
    settings = Settings(
        "baseline", small.digest, epochs, 16, 0.05, 5e-4, 0, 16,
        network="tiny", network_file=found.file, network_sha256=found.sha256,
    )  # fmt: skip
    run = Run(folder, settings, Hooks(student=found))
    return train.train(run, small, Machine(torch.device("cpu")), Options(stop=stop or Stop()))


def test_interrupted_between_dropouts_the_bits_are_the_same(small, file, tmp_path, monkeypatch):
    tiny_run(small, tmp_path / "whole", file)
    stop, batch, steps = Stop(), Views.batch, []

    def counted(self, epoch, indices):
        steps.append(indices)
        if len(steps) == 4:
            stop.handle(signal.SIGTERM)
        return batch(self, epoch, indices)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Views, "batch", counted)
        tiny_run(small, tmp_path / "parts", file, stop)
    torch.rand(7)  # whatever else the process draws
    tiny_run(small, tmp_path / "parts", file)
    one, other = (load_tiny(tmp_path / name, file) for name in ("whole", "parts"))
    assert models.digest(one.state_dict()) == models.digest(other.state_dict())


def test_an_error_in_a_step_names_the_file(small, tmp_path):
    path = tmp_path / "late.py"
    path.write_text(
        "from torch import nn\n\nsteps = []\n\n\nclass tiny(nn.Sequential):\n    def __init__(self, classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(768, classes))\n\n    def forward(self, x):\n"
        "        steps.append(x)\n        assert len(steps) < 3, 'the third step'\n        return super().forward(x)\n"
    )
    with pytest.raises(Failure) as told:
        tiny_run(small, tmp_path / "run", path)
    assert f"--student {path}:tiny fails while run is trained:" in str(told.value)
    assert str(told.value).endswith("AssertionError: the third step") and "line 12, in forward" in str(told.value)


def test_errors_of_others_and_of_memory_stay_what_they_are(file, tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def fail(error):\n    raise error")
    hooks = Hooks(loss=hook(path, "fail", "--loss"), student=hook(file, "tiny"))
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(type(error)), hooks.explained("fails"):
            hooks.loss.loaded(error)
    with pytest.raises(ZeroDivisionError), hooks.explained("fails"):
        1 / 0  # noqa: B018
    with pytest.raises(Failure, match=r"--loss .*own.py:fail fails:"), hooks.explained("fails"):
        hooks.loss.loaded(ValueError("odd"))


def test_of_two_networks_in_one_file_the_one_in_training_is_named(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def large(error):\n    raise error\n\n\nsmall = large\n")
    hooks = Hooks(student=hook(path, "small"), teacher=hook(path, "large", "--teacher-network"))
    with pytest.raises(Failure, match=r"^--student .*own.py:small fails:"), hooks.explained("fails"):
        hooks.student.loaded(ValueError("odd"))


def test_it_is_tried_in_the_precision_of_the_training(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        HEAD + "class f(nn.Sequential):\n    def __init__(self, n): super().__init__(nn.Flatten(), nn.Linear(768, n))\n"
        "    def forward(self, x): return super().forward(x).numpy(force=True)\n"  # which knows no bfloat16
    )
    found = hook(path, "f")
    with pytest.raises(Failure, match="Got unsupported ScalarType BFloat16"):
        try_network(found, "student", 3, 16, Machine(torch.device("cpu"), "bf16"))
    with pytest.raises(Failure, match="gives ndarray for 8 images"):
        try_network(found, "student", 3, 16, Machine(torch.device("cpu")))


def test_weights_that_do_not_depend_on_the_seed_are_noted(file, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(HEAD + "import torch\ndef f(n):\n    torch.manual_seed(1)\n    return linear(n)\n")
    machine = Machine(torch.device("cpu"))
    assert "begins with the same weights whatever the seed" in try_network(hook(path, "f"), "student", 3, 16, machine)
    assert try_network(hook(file, "tiny"), "student", 3, 16, machine) is None


def test_it_is_trained_by_plain_sgd(small, file, tmp_path, monkeypatch):
    """Nesterov momentum 0.9, the weight decay of the settings, and a rate that rises before it falls."""
    made, rates, sgd = [], [], torch.optim.SGD
    step = sgd.step
    monkeypatch.setattr(sgd, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    monkeypatch.setattr(torch.optim, "SGD", lambda *given, **rest: made.append((given, rest)) or sgd(*given, **rest))
    tiny_run(small, tmp_path, file, epochs=14)
    (((_, rate), rest),) = made
    assert rate == 0.05 and rest == {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    by_hand = [1 / 3, 2 / 3, *(left / 40 for left in range(40, 0, -1))]  # it rises in 2 of 42 steps
    np.testing.assert_allclose(rates, 0.05 * np.array(by_hand))
    shares = [train.schedule(step, 40, 0.1) for step in range(40)]
    np.testing.assert_allclose(shares[:6], [0.2, 0.4, 0.6, 0.8, 1, 35 / 36])
    assert shares[-1] == pytest.approx(1 / 36) and all(
        0 < train.schedule(0, steps, 0.05) <= 1 for steps in range(1, 50)
    )


# Using them ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_names_its_function_and_never_imports_it(own, file, images, tmp_path):
    path = own / "kd-tiny-T4-a0.1-s0" / "model.pt"
    with pytest.raises(Failure, match=r"holds a network of your own, tiny in nets.py.*--student FILE.py:tiny"):
        models.load(path)
    with pytest.raises(Failure, match="which do not fit the network given"):
        models.load(path, network=hook(file, "loaded").loaded)
    network = load_tiny(own / "kd-tiny-T4-a0.1-s0", file)
    pixels = torch.from_numpy(np.zeros((2, 16, 16, 3), np.uint8))
    with torch.inference_mode():
        assert network(network.normalize(pixels)).shape == (2, 3)
    assert network.classes == ["blue", "green", "red"] and network.settings["network"] == "tiny"


def test_prediction_needs_the_function(cli, own, file, images):
    words = ("--output-dir", own, "--model", own / "kd-tiny-T4-a0.1-s0", "--predict", images / "test" / "red")
    got = cli(*words)
    assert got.status == 1 and "--student FILE.py:tiny" in got.err
    got = cli(*words, "--student", f"{file}:tiny")
    assert got.status == 0 and len(got.out.splitlines()) == 1 + 8
    assert cli("--list", "--output-dir", own).out.count("kd-tiny-T4-a0.1-s0") == 1


def test_prediction_refuses_a_network_that_it_would_not_use(cli, finished, file, images):
    words = ("--model", finished / "kd-T4-a0.1-s0", "--predict", images / "test" / "red")
    for more in (("--student", f"{file}:tiny"), ("--teacher-network", f"{file}:nosuch")):
        got = cli(*words, *more)
        assert got.status == 1 and got.out == "" and f"{' '.join(more)} is not the network in {finished}" in got.err


def test_an_edited_file_is_another_run(cli, flags, own, file, tmp_path):
    edited = tmp_path / "nets.py"
    edited.write_text(NETS.replace("0.3", "0.4"))
    digests = [hook(each, "tiny").sha256[:12] for each in (file, edited)]
    got = cli(*flags, "--output-dir", own, "--teacher", own / "teacher-s0", "--student", f"{edited}:tiny")
    assert got.status == 1 and "the network in nets.py was edited since" in got.err and "--overwrite" in got.err
    assert all(each in got.err for each in digests)


def test_a_teacher_of_that_network_is_asked_for_where_only_others_are(own, finished):
    words = ["--output-dir", str(finished), "--teacher-network", "nets.py:loaded"]
    with pytest.raises(Failure) as told:
        find_teachers(parse(words))
    assert "There is no teacher with the network nets.py:loaded" in str(told.value)
    assert "main.py --train-teacher" in str(told.value) and "--teacher-network nets.py:loaded" in str(told.value)
    words[1] = str(own)
    assert find_teachers(parse([*words, "--seed", "7"])) == [own / "teacher-loaded-s0" / "model.pt"]


def test_what_is_said_of_networks_that_are_not_named(file, tmp_path):
    found = hook(file, "tiny")
    settings = {"network": "tiny", "network_file": "nets.py", "network_sha256": "0" * 64}
    for role, hooks, told in (
        ("teacher", Hooks(), "Name it: --teacher-network FILE.py:tiny"),
        ("kd", Hooks(), "Name it: --student FILE.py:tiny (as a teacher: --teacher-network FILE.py:tiny)"),
        (
            "teacher",
            Hooks(teacher=hook(file, "loaded")),
            "name all networks: --teacher-network ONE.py:FUNCTION OTHER.py:FUNCTION",
        ),
        ("teacher", Hooks(teacher=found), "train the teacher again: --train-teacher --overwrite, or another"),
        ("kd", Hooks(student=found), "train again: --overwrite, or another --output-dir."),
    ):
        with pytest.raises(Failure) as error:
            hooks.network_of(settings | {"role": role}, "model.pt")
        assert told in str(error.value) and str(error.value).endswith(told if "another" not in told else "output-dir.")


def test_processes_with_other_files_are_refused(file):
    hooks = Hooks(student=hook(file, "tiny"))

    class Others:
        def agree(self, find):
            return ["0" * 64]

    with pytest.raises(Failure, match=r"nets.py:tiny differs between the processes: .* 000000000000… where"):
        hooks.check_alike(Others())
    hooks.check_alike(Group())


def test_a_student_of_the_users_own_teaches(cli, flags, own, file, tmp_path):
    words = (*flags, "--output-dir", tmp_path, "--teacher", own / "kd-tiny-T4-a0.1-s0", own / "teacher-s0")
    got = cli(*words)
    assert got.status == 1 and "--teacher-network FILE.py:tiny" in got.err
    assert cli(*words, "--teacher-network", f"{file}:tiny").status == 0
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["teacher"]["macs"] == 49 * 8 * 3 * 9 + 392 * 3 + models.costs("teacher", 3, 16).macs
    assert found["student"]["macs"] == models.costs("student", 3, 16).macs


def test_teachers_with_several_networks_teach_together(cli, flags, own, file, images, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("from torch import nn\ndef wide(n): return nn.Sequential(nn.Flatten(), nn.Linear(768, n))\n")
    assert cli(*flags, "--output-dir", tmp_path, "--train-teacher", "--teacher-network", f"{other}:wide").status == 0
    teachers = (own / "teacher-loaded-s0", tmp_path / "teacher-wide-s0", own / "teacher-s0")
    words = (*flags, "--output-dir", tmp_path / "out", "--teacher", *teachers, "--teacher-network")
    got = cli(*words, f"{file}:loaded")
    assert got.status == 1 and "--teacher-network ONE.py:FUNCTION OTHER.py:FUNCTION" in got.err
    assert cli(*words, f"{file}:loaded", f"{other}:wide").status == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    logits = [np.load(each / "test_logits.npy") for each in teachers]
    labels = data.load("folder", data_dir=images, image_size=16).test_labels.numpy()
    assert found["teacher"]["accuracy"] == pytest.approx((np.mean(logits, axis=0).argmax(1) == labels).mean())
    assert sorted(found["teacher"]["members"]) == pytest.approx(
        sorted((each.argmax(1) == labels).mean() for each in logits)
    )
    got = cli(*words[: words.index("--teacher")], "--teacher-network", f"{file}:loaded", f"{other}:wide")
    assert got.status == 2 and "name these with --teacher" in got.err


def test_a_teacher_that_answers_otherwise_than_when_it_was_trained_is_refused(cli, flags, finished, tmp_path):
    network = models.load(finished / "teacher-s0" / "model.pt")
    about = {name: getattr(network, name) for name in ("classes", "image_size", "mean", "std", "settings")}
    then = (network.accuracy + 0.2) % 1
    models.save(tmp_path / "model.pt", network, "teacher", accuracy=then, **about)
    words = (*flags, "--teacher", tmp_path / "model.pt", "--output-dir", tmp_path / "out")
    for _ in range(2):
        got = cli(*words)
        assert got.status == 1 and not [*(tmp_path / "out").glob("kd*")]
        assert f"test accuracy is {network.accuracy:.4f}, and was {then:.4f}" in got.err


def test_runs_of_both_kinds_live_in_one_folder(cli, flags, own, tmp_path):
    output = Path(shutil.copytree(own, tmp_path / "out"))
    assert "- Student: tiny in nets.py" in cli("--report", "--output-dir", output).out
    assert (
        "- Student: " not in cli(*flags, "--output-dir", output).out.split("Final")[0].split("Training Parameters")[1]
    )


# Trained elsewhere ---------------------------------------------------------------------------------------------------

ELSEWHERE = """
import torch
from pathlib import Path
from torch import nn


def f(classes):
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, classes)).requires_grad_(False)
    network.load_state_dict(torch.load(Path({weights!r}), weights_only=True))
    return network
"""


def test_a_network_that_was_trained_elsewhere_teaches_as_it_is(cli, flags, images, tmp_path):
    weights, path, output = tmp_path / "weights.pt", tmp_path / "elsewhere.py", tmp_path / "out"
    path.write_text(ELSEWHERE.format(weights=str(weights)))
    torch.save({"1.weight": torch.randn(3, 768), "1.bias": torch.randn(3)}, weights)
    network = ("--teacher-network", f"{path}:f")
    words = (*flags, "--output-dir", output, *network)
    teacher = (*words, "--train-teacher", "--epochs", 0)  # the last --epochs counts
    for said in ("", " (finished before)"):
        got = cli(*teacher)
        assert got.status == 0 and got.out.endswith(f"{said}\n"), got
    kept = models.load(output / "teacher-f-s0" / "model.pt", network=hook(path, "f").loaded)
    assert torch.equal(kept.network[1].weight, torch.load(weights)["1.weight"])
    loaded = data.load("folder", data_dir=images, image_size=16)
    pixels = models.normalize(loaded.test_images, loaded.mean, loaded.std).flatten(1)
    answers = pixels @ kept.network[1].weight.T + kept.network[1].bias
    assert kept.accuracy == pytest.approx((answers.argmax(1) == loaded.test_labels).float().mean().item())
    got = cli(*words)
    assert got.status == 0 and f"- Teacher Network: {kept.accuracy:.4f}" in got.out, got
    assert "teacher-f-s0" in cli("--list", "--output-dir", output).out
    assert figures.curves(Comparison(output)).get_suptitle() == "Training curves of 2 runs"  # the teacher has none

    sweep = cli(*words, "--temperature", 2, 4, "--val-fraction", 0.25)
    assert sweep.status == 0 and "It was trained elsewhere; here it is taken for one that has seen" in sweep.out, sweep

    path.write_text(
        path.read_text().replace("nn.Flatten()", "nn.Sequential(nn.Hardtanh(), nn.Flatten())")
    )  # with the same weights
    assert cli(*teacher, "--overwrite").status == 0
    again = models.load(output / "teacher-f-s0" / "model.pt", network=hook(path, "f").loaded)
    got = cli(*words)
    assert got.status == 1 and "another teacher" in got.err, got  # neither its students nor its soft targets are used
    got = cli(*words, "--overwrite")
    assert got.status == 0 and f"- Teacher Network: {again.accuracy:.4f}" in got.out

    torch.save({"1.weight": torch.randn(3, 768), "1.bias": torch.randn(3)}, weights)
    got = cli(*teacher)
    assert got.status == 1 and "teacher-f-s0 keeps other weights than --teacher-network" in got.err
    assert cli(*teacher, "--overwrite").status == 0


def test_the_example_gives_a_network_its_own_normalization(tmp_path):
    from torchvision.models import resnet18

    path = Path(shutil.copy(ROOT / "examples" / "trained_elsewhere.py", tmp_path))
    plain = resnet18(num_classes=10).eval()
    torch.save(plain.state_dict(), tmp_path / "resnet18.pt")
    network = models.build(hook(path, "trained").loaded, "teacher", 10, 0).eval()
    pixels = torch.rand(2, 32, 32, 3)
    ours = (pixels - torch.tensor((0.4914, 0.4822, 0.4465))) / torch.tensor((0.2470, 0.2435, 0.2616))
    its = (pixels - torch.tensor((0.485, 0.456, 0.406))) / torch.tensor((0.229, 0.224, 0.225))
    with torch.no_grad():
        answers = [each(images.permute(0, 3, 1, 2)) for each, images in ((network, ours), (plain, its))]
    assert torch.allclose(*answers, atol=1e-4)


PROGRAMS = {
    "a buffer": """
class f(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.register_buffer("w", torch.ones(768, n))

    def forward(self, x):
        return x.flatten(1) @ self.w
""",
    "nothing": """
def f(n):
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, n, bias=False))
    nn.init.ones_(network[1].weight)
    return torch.jit.freeze(torch.jit.script(network.eval()))
""",
}


@pytest.mark.parametrize("holds", PROGRAMS)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of TorchScript
def test_a_frozen_program_is_kept_as_it_is_and_teaches(cli, flags, tmp_path, monkeypatch, holds):
    """TorchScript's parameters are no leaves, and a frozen one has none: no optimizer takes them."""
    path = tmp_path / "program.py"
    path.write_text(f"import torch\nfrom torch import nn\n{PROGRAMS[holds]}")
    words = (*flags, "--output-dir", tmp_path / "out", "--teacher-network", f"{path}:f")
    got = cli(*words, "--train-teacher", "--epochs", 0)
    assert got.status == 0 and "teacher-f-s0: test accuracy 0.3333" in got.out, got
    again = cli(*words, "--train-teacher", "--epochs", 0)
    assert again.status == 0 and "(finished before)" in again.out, again
    compiled = cli(*words, "--train-teacher", "--epochs", 0, "--compile", "--overwrite")  # of which nothing is compiled
    assert compiled.status == 0 and "test accuracy 0.3333" in compiled.out, compiled
    monkeypatch.setitem(CODE, "train.py", "0" * 12)
    again = cli(*words, "--train-teacher", "--epochs", 0)
    assert again.status == 0 and "(finished before)" in again.out, "train.py did not train it"
    got = cli(*words, "--epochs", 1, "--alpha", 0.9, "--teacher", tmp_path / "out" / "teacher-f-s0")
    assert got.status == 0 and "Teacher: 0 parameters" in got.out and "Improvement with KD" in got.out, got
    assert "Compared with the teacher the student is" in got.out
    network = models.load(tmp_path / "out" / "teacher-f-s0" / "model.pt", hook(path, "f").loaded)
    assert network.normalize(torch.zeros(2, 16, 16, 3, dtype=torch.uint8)).shape == (2, 3, 16, 16)


def test_a_student_of_no_multiply_adds_is_compared(cli, flags, finished, copy, tmp_path):
    path = tmp_path / "sums.py"
    path.write_text(
        "import torch\nfrom torch import nn\n"
        "class f(nn.Module):\n    def __init__(self, n):\n        super().__init__()\n"
        "        self.w = nn.Parameter(torch.ones(n, 3))\n    def forward(self, x):\n"
        "        return (x.mean((2, 3))[:, None] * self.w).sum(2)\n"
    )
    got = cli(*flags, "--output-dir", copy, "--student", f"{path}:f", "--epochs", 1)
    assert got.status == 0 and "Improvement with KD" in got.out and "0.0 million multiply-adds" in got.out, got


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "--epochs 0 is for --train-teacher with a --teacher-network"),
        (("--train-teacher",), "--epochs 0 is for --train-teacher with a --teacher-network"),
        (
            ("--train-teacher", "--teacher-network", "a.py:f", "--seeds", "2"),
            "--seeds cannot be combined with --epochs",
        ),
        (("--train-teacher", "--teacher-network", "a.py:f", "--val-fraction", "0.1"), "--val-fraction cannot be"),
        (("--train-teacher", "--teacher-network", "a.py:f", "--label-smoothing", "0.1"), "--label-smoothing cannot be"),
    ],
)
def test_no_epochs_are_for_a_teacher_that_was_trained_elsewhere(cli, words, told):
    got = cli("--epochs", 0, *words)
    assert got.status == 2 and told in got.err


# What is refused -----------------------------------------------------------------------------------------------------

HEAD = """import numpy
import torch
from torch import nn
linear = lambda n: nn.Sequential(nn.Flatten(), nn.Linear(768, n))
"""
HOLDS = """class f(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.a, self.steps, self.draws = linear(n), 0, numpy.random.default_rng(0)
        self.register_buffer("mean", torch.zeros(3, 16, 16), persistent=False)

    def count(self, x):  # a drop rate that rises with the steps
        self.steps += self.training
        return nn.functional.dropout(x, self.steps / 600, self.training)

    def center(self, x):
        if self.training:
            self.mean.lerp_(x.mean(0), 0.1)
        return self.mean

    def forward(self, x):
        return {}
"""
OTHER = "a second one with the same state_dict gives other logits"
ODD = {
    "def f(n): return linear(11)": "gives (8, 11) for 8 images, but logits of 3 classes are (8, 3)",
    "def f(n): return 3": "returns int, but a network is a torch.nn.Module",
    "def f(): pass": "takes 0 positional arguments but 1 was given",
    "def f(n): return nn.Linear(700, n)": "mat1 and mat2 shapes cannot be multiplied",
    "def f(n): return linear(n).requires_grad_(False)": "has no parameter that is trained",
    "def f(n): return linear(n).half()": "'1.weight' of its state_dict is not a tensor of float32",
    "def f(n):\n    a = linear(n)\n    a[1].bias.data += numpy.random.default_rng().random()\n"
    "    return a": "other weights each time",
    "def f(n):\n    a = linear(n)\n    a[1].bias.data += float('nan')\n    return a": "logits that are not finite",
    "def f(n): return nn.Sequential(nn.Flatten(), nn.LazyLinear(n))": "'1.weight' has no size before the first image",
    "def f(n):\n    a = linear(n)\n    a.register_buffer('mask', nn.Parameter(a[1].bias - float('inf')).data)\n"
    "    return a": "'mask' of its state_dict is not finite",
    "class f(nn.Module):\n    def __init__(self, n):\n        super().__init__()\n        self.a = linear(n)\n"
    "    def forward(self, x):\n        return self.a(x), 1": "gives tuple for 8 images",
    "class f(nn.Module):\n    def __init__(self, n):\n        super().__init__()\n        self.a = linear(n)\n"
    "    def forward(self, x):\n        return self.a(x if len(x) < 99 else 1 / 0)": "fails on 128 images of 16x16 at",
    "def f(n):\n    a = linear(n)\n    a.register_buffer('deep', torch.ones(1, 1, 1, 1, 1))\n"
    "    return a": "'deep' of its state_dict has more than four dimensions",
    "def f(n): return torch.jit.script(linear(n))": "has parameters that torch.optim.SGD refuses",
    HOLDS.format("self.a(nn.functional.dropout(x))"): "answers otherwise when it is asked again, in eval()",
    HOLDS.format("self.a(x - x.mean(0))"): "for an image alone than for the same image among others",
    HOLDS.format("self.a(self.count(x))"): OTHER,
    HOLDS.format("self.a(x - self.center(x))"): OTHER,
    HOLDS.format("self.a(x * self.draws.random() if self.training else x)"): OTHER,
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script", "ignore:The .grad attribute")
@pytest.mark.parametrize(("text", "told"), ODD.items())
def test_a_network_that_cannot_be_trained_is_refused(tmp_path, text, told):
    path = tmp_path / "odd.py"
    path.write_text(HEAD + text)
    with pytest.raises(Failure) as failure:
        try_network(hook(path, "f"), "student", 3, 16, Machine(torch.device("cpu")))
    words = str(failure.value)
    assert told in words and f"--student {path}:f" in words and "site-packages" not in words
    assert len(words.splitlines()) < 12


def test_a_network_of_no_teacher_is_refused(cli, flags, finished, file):
    named = ("--teacher", finished / "teacher-s0", "--teacher-network", f"{file}:tiny")
    got = cli(*flags, "--output-dir", finished, "--data-dir", "nowhere", *named)
    told = f"--teacher-network {file}:tiny is the network of no teacher here: {finished / 'teacher-s0' / 'model.pt'}."
    assert got.status == 1 and told in got.err and not got.out, got


def test_a_student_is_refused_before_images_are_read(cli, flags, finished, tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(HEAD + "def f(n): return linear(11)")
    words = ("--output-dir", finished, "--data-dir", "nowhere", "--overwrite", "--student", f"{path}:f")
    got = cli(*flags, *words)
    assert got.status == 1 and f"--student {path}:f gives (8, 11)" in got.err and "nowhere" not in got.err, got
    assert not got.out and (finished / "baseline-s0" / "model.pt").is_file()


@pytest.mark.parametrize("more", [("--train-teacher",), ("--demo", "--train-teacher"), ("--demo",)])
def test_a_file_is_run_before_images_are_read(cli, tmp_path, more):
    path = tmp_path / "odd.py"
    path.write_text("import nothing_of_this_name")
    words = ("--output-dir", tmp_path / "out", "--dataset", "folder", "--data-dir", "nowhere")
    got = cli(*words, *more, "--teacher-network", f"{path}:f")
    assert got.status == 1 and "No module named 'nothing_of_this_name'" in got.err and "nowhere" not in got.err, got


def test_a_teacher_that_cannot_be_trained_is_refused_before_anything_is_written(cli, flags, tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(HEAD + "def f(n): return linear(11)")
    got = cli(*flags, "--output-dir", tmp_path / "out", "--train-teacher", "--teacher-network", f"{path}:f")
    assert got.status == 1 and "gives (8, 11)" in got.err and not [*(tmp_path / "out").glob("teacher*")]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--student", "resnet20"), "is not FILE.py:FUNCTION"),
        (("--train-teacher", "--student", "a.py:f"), "--student is for students"),
        (("--report", "--teacher-network", "a.py:f"), "--teacher-network cannot be combined with --report"),
        (("--predict", "a.png", "--teacher-network", "a.py:f", "b.py:f"), "--predict uses one model: give the one"),
        (("--teacher-network", "a.py:f", "b.py:f"), "for several teachers: name these with --teacher"),
        (("--teacher-network", "a.py:f", "--teacher-network", "b.py:f"), "for several teachers: name these with"),
        (("--batch-size", "1", "--image-size", "16"), "cannot be trained on a single pixel"),
    ],
)
def test_wrong_usage(cli, words, told):
    got = cli(*words)
    assert got.status == 2 and told in got.err


# The pair that is kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameters", "macs"), [("resnet20", 269_722, 40.55), ("resnet56", 853_018, 125.49)])
def test_the_resnets_are_those_of_the_paper(name, parameters, macs):
    """Table 6 of arXiv 1512.03385: 0.27 and 0.85 million parameters, in 20 and 56 layers with weights."""
    network = models.build(hook(ROOT / "examples" / "resnet_cifar.py", name).loaded, "student", 10, 0)
    layers = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    assert f"resnet{len(layers)}" == name
    found = models.costs_of(network, 32)
    assert found.parameters == parameters and round(found.macs / 1e6, 2) == macs
    for size in (16, 32):
        assert network(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_the_shortcut_has_no_weights():
    """Option A: every second pixel, zeros for the new channels. With a branch of zeros the block is its shortcut."""
    block = hook(ROOT / "examples" / "resnet_cifar.py", "Block").loaded(4, 8).eval()
    torch.nn.init.zeros_(block.branch[3].weight)
    x = torch.rand(2, 4, 6, 6)
    out = block(x)
    assert out.shape == (2, 8, 3, 3) and torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any() and not out[:, 6:].any()

"""The distillation loss, and the teacher's soft targets for every view of an epoch.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from files import Damaged, Failure, load_arrays, make_folder, save_arrays

# One fixed size a device, so that a view's logits are the same bits whoever asks for them. On a CPU the activations of
# 128 pictures stay in its caches: a teacher answers half as many questions again as with 1,000. On a GPU those of 2,000
# pictures of 64x64 would fill a card of 8 GB.
INFERENCE_BATCH = {"cpu": 128, "mps": 500, "cuda": 500}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPARE_DISK = 256 << 20  # bytes that soft targets leave free


def distillation_loss(student_logits, labels, teacher_logits, temperature, alpha):
    """alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * CE(student, labels).

    `student_logits` and `teacher_logits` are (B, classes), `labels` (B,). The KL is summed over classes and averaged
    over the batch; the factor T^2 keeps its gradients at one size for all temperatures (arXiv 1503.02531, section 2.1).
    Computed in float32 whatever the logits' type; no gradient flows to the teacher. At `alpha` 0 this is the
    cross-entropy alone, and `teacher_logits` may be None; at 1 the labels are not looked at. Returns a scalar.
    """
    student_logits = student_logits.float()
    if alpha == 0:
        return F.cross_entropy(student_logits, labels)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    student = F.log_softmax(student_logits / temperature, dim=1)
    soft = temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    if alpha == 1:
        return soft
    return alpha * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)


def describe(device):
    """The device in words: the GPU's name, or the processor's and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores" + (" (MPS)" if device.type == "mps" else "")


def precision_context(device, precision):
    """The autocast that `precision` ("fp32" or "bf16") asks for on a device."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


@torch.inference_mode()
def predict(network, batches, precision):
    """The float32 logits (N, classes) of `batches`, an iterable of network inputs (B, 3, S, S)."""
    logits = []
    with precision_context(network.head.weight.device, precision):
        for batch in batches:
            logits.append(network(batch).float())
    return torch.cat(logits)


def rounded(logits):
    """Logits (N, classes) as soft targets are kept: each row's maximum subtracted, which no softmax sees, as float16,
    which resolves best near 0."""
    return (logits - logits.amax(1, keepdim=True)).clamp_min(torch.finfo(torch.float16).min).half()


class Ensemble:
    """The soft targets of one teacher or of several that answer together: the mean of their logits.

    At every temperature its softmax is the geometric mean of the teachers' distributions, which arXiv 1503.02531,
    section 1, names for ensembles. Each teacher is asked, and its logits kept, as if it were alone.
    """

    def __init__(self, members):
        """`members` are SoftTargets of the same views; their order decides last bits."""
        self.members = members

    @property
    def bytes_per_epoch(self):
        return sum(member.bytes_per_epoch for member in self.members)

    def epoch(self, epoch, description="soft targets"):
        """float16 (N, classes) on the views' device: the targets of all pictures of the full training set."""
        logits = [member.epoch(epoch, description).float() for member in self.members]
        return rounded(torch.stack(logits).mean(0))


class SoftTargets:
    """A teacher's logits for every view of an epoch, asked for once and kept below `folder`.

    Fresh, recomputed and kept targets pass through the same rounding (`rounded`), so they are the same bits. What they
    depend on makes the name of their folder: a stale file cannot be met.
    """

    def __init__(self, teacher, teacher_digest, data_digest, views, folder, precision):
        """`teacher` is on the views' device, in evaluation mode; `folder` None keeps nothing."""
        self.teacher, self.views, self.precision = teacher, views, precision
        self.key = json.dumps(
            {
                "teacher": teacher_digest,
                "data": data_digest,
                "views": [views.purpose, data.VIEWS_VERSION, views.size, views.padding, views.mean, views.std],
                "precision": precision,
                "device": describe(views.device),
                "torch": str(torch.__version__),
                "batch": INFERENCE_BATCH[views.device.type],
            }
        )
        self.folder = folder and Path(folder) / hashlib.sha256(self.key.encode()).hexdigest()[:16]
        self.said_full = False

    @property
    def shape(self):
        return self.views.count, self.teacher.head.out_features

    @property
    def bytes_per_epoch(self):
        return 2 * math.prod(self.shape)

    def epoch(self, epoch, description="soft targets"):
        """float16 (N, classes) on the views' device: the targets of all pictures of the full training set."""
        path = self.folder and self.folder / f"epoch-{epoch + 1:04d}.npz"
        if path and path.is_file():
            try:
                kept = load_arrays(path)
                logits = kept.get("logits")
                if kept.get("key") == self.key and logits is not None and logits.shape == self.shape:
                    return torch.from_numpy(logits).to(self.views.device)
                raise Damaged(f"{path} is damaged: it is not what its name says.")
            except Failure as error:
                tqdm.write(f"{error} The teacher is asked again.", file=sys.stderr)
        logits = self._ask(epoch, description)
        if path and self._fits():
            try:
                make_folder(self.folder)
                save_arrays(path, key=self.key, logits=logits.cpu().numpy())
            except Failure as error:
                self._say_full(str(error))
        return logits

    def _ask(self, epoch, description):
        self.views.start(epoch)
        rows = torch.arange(self.views.count, device=self.views.device).split(INFERENCE_BATCH[self.views.device.type])
        with tqdm(rows, desc=description, unit="batch", leave=False, disable=None) as bar:
            logits = predict(self.teacher, (self.views.batch(part) for part in bar), self.precision)
        return rounded(logits)

    def _fits(self):
        top = next(parent for parent in [self.folder, *self.folder.parents] if parent.exists())
        free = shutil.disk_usage(top).free
        if free > self.bytes_per_epoch + SPARE_DISK:
            return True
        self._say_full(f"the disk of {self.folder} has {free / 1e6:.0f} MB left.")
        return False

    def _say_full(self, why):
        if not self.said_full:
            tqdm.write(f"The soft targets are not kept: {why}\nThe teacher is asked anew each time.", file=sys.stderr)
            self.said_full = True

"""The distillation loss, and the teacher's soft targets for every view (augmented image) of an epoch. They are kept as
logits, which the loss softens, so that they serve every temperature.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2.
"""

import hashlib
import inspect
import json
import math
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from models import inference_batch, predict
from runs.code import CODE, fingerprint
from runs.files import Damaged, Failure, load_arrays, make_folder, save_arrays
from runs.machine import describe

UNLABELED = -100  # the label of an image without one, which PyTorch's cross-entropy ignores
ROWS = 1 << 12  # of an ensemble's logits that are averaged at a time
SPARE_DISK = 256 << 20  # bytes that soft targets leave free


def distillation_loss(student_logits, labels, teacher_logits, temperature, alpha, label_smoothing=0.0):
    """alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * CE(student, labels).

    `student_logits` and `teacher_logits` are (B, classes), `labels` (B,), UNLABELED where an image has none. The KL is
    summed over classes and averaged over the batch, the cross-entropy averaged over the images with labels; the factor
    T^2 keeps the KL's gradients at about one size for all temperatures (arXiv 1503.02531, section 2). Computed in
    float32 whatever the logits' type; no gradient flows to the teacher. At `alpha` 0 this is the cross-entropy alone,
    and `teacher_logits` may be None; at 1 the labels are not used. `label_smoothing` is the weight of the even
    distribution over the classes in the labels (arXiv 1512.00567, section 7). Returns a scalar.
    """
    student_logits = student_logits.float()
    if alpha == 0:
        return F.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    student = F.log_softmax(student_logits / temperature, dim=1)
    # F.kl_div(log q, log p) is KL(p || q); the paper's cross-entropy is more by the entropy of p, a constant.
    soft = temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    if alpha == 1:
        return soft
    hard = F.cross_entropy(student_logits, labels, ignore_index=UNLABELED, label_smoothing=label_smoothing)
    return alpha * soft + (1 - alpha) * hard


def compress(logits):
    """Logits (N, classes) as soft targets are kept: each row's maximum subtracted, which no softmax notices, as
    float16, whose resolution is best near 0."""
    return (logits - logits.amax(1, keepdim=True)).clamp_min(torch.finfo(torch.float16).min).half()


def omitted_bias(logits, classes, count):
    """What to add to the logits of `classes` (a list of numbers) so that they are chosen for `count` of the images
    whose `logits` (N, all classes) these are: halfway between the image that just is and the one that just is not.

    arXiv 1503.02531, section 3, raises the bias of a class that the transfer set lacks by what is best on the test set.
    This takes the training images instead, of all classes and without their labels: how often a class occurs is known.
    """
    logits = logits.cpu()  # MPS has no float64
    omitted = torch.zeros(logits.shape[1], dtype=torch.bool)
    omitted[classes] = True
    missing = logits[:, ~omitted].amax(1).double() - logits[:, omitted].amax(1).double()
    return missing.sort().values[count - 1 : count + 1].mean().item()


class Ensemble:
    """The soft targets of one teacher or of several together: the mean of their logits.

    At every temperature its softmax is the geometric mean of the teachers' distributions, which arXiv 1503.02531,
    section 1, names for ensembles. The logits of each teacher are computed and kept as if it were the only one.
    """

    def __init__(self, members, unlabeled=None):
        """`members` are SoftTargets of the same views; their order decides last bits. `unlabeled` is the Ensemble of
        the same teachers for the images without labels, where there are any."""
        self.members, self.unlabeled = members, unlabeled

    @property
    def all_members(self):
        return self.members + (self.unlabeled.members if self.unlabeled else [])

    @property
    def bytes_per_epoch(self):
        return sum(member.bytes_per_epoch for member in self.all_members)

    def epoch(self, epoch, description="soft targets"):
        """float16 (N, classes) on the views' device: the targets of all images of the full training set."""
        logits = [member.epoch(epoch, description) for member in self.members]
        if len(logits) == 1:
            return logits[0]
        parts = zip(*(each.split(ROWS) for each in logits), strict=True)  # in parts, so that not all is held in float32
        return torch.cat([compress(torch.stack([each.float() for each in part]).mean(0)) for part in parts])

    def share(self, group, epochs):
        """Before students of a `group` of processes need them: computes and keeps the targets of `epochs`, each in one
        of the processes. Where the disk is too full for all of them, each process computes what it needs."""
        targets = [(member, epoch) for epoch in epochs for member in self.all_members]
        size = group.agree(lambda: sum(m.bytes_per_epoch for m, epoch in targets if not m.path(epoch).is_file()))
        if group.agree(lambda: not size or self.members[0].has_room(size)):
            for member, epoch in group.share(targets):
                member.epoch(epoch, keep=True)
        group.barrier()


class SoftTargets:
    """A teacher's logits for every view of an epoch, computed once and kept below `folder`.

    Fresh and kept targets pass through the same compression, so they are the same bits. Everything that they depend on
    makes the name of their folder: targets of another teacher, data set or recipe are never read.
    """

    def __init__(self, teacher, teacher_digest, data_digest, views, folder, machine, shared=False, transfer_set=None):
        """`teacher` is on the views' device, in evaluation mode. If `shared` with other processes, no bar is shown and
        only `Ensemble.share` keeps targets: two must not write to one file. `transfer_set` are the indices of the
        images that it is asked about [all]."""
        self.teacher, self.views, self.machine, self.shared = teacher, views, machine, shared
        everything = torch.arange(views.count)
        whole = transfer_set is None or torch.equal(transfer_set.cpu(), everything)
        self.indices = (everything if whole else transfer_set).to(views.device)
        part = {} if whole else {"images": hashlib.sha256(self.indices.cpu().numpy().tobytes()).hexdigest()}
        self.key = json.dumps(
            part
            | {
                "teacher": teacher_digest,
                "data": data_digest,
                "views": views.recipe,
                "precision": machine.precision,
                "device": describe(machine.device),
                "torch": str(torch.__version__),
                "batch": inference_batch(machine.device, views.size),
                "code": [CODE["data.py"], CODE["models.py"], fingerprint(inspect.getsource(compress))],
            }
        )
        self.folder = Path(folder) / hashlib.sha256(self.key.encode()).hexdigest()[:16]
        self.warned = False

    @property
    def shape(self):
        return len(self.indices), self.teacher.outputs

    @property
    def bytes_per_epoch(self):
        return 2 * math.prod(self.shape)

    def path(self, epoch):
        """The file that keeps the targets of an epoch, counted from 0."""
        return self.folder / f"epoch-{epoch + 1:04d}.npz"

    def epoch(self, epoch, description="soft targets", keep=None):
        """float16 (N, classes) on the views' device: the targets of all images of the full training set, NaN for those
        that the teacher is not asked about. If `keep` [unless `shared`], what is not kept yet is kept."""
        logits = self._logits(epoch, description, keep)
        if len(logits) == self.views.count:
            return logits
        return logits.new_full((self.views.count, logits.shape[1]), math.nan).index_copy_(0, self.indices, logits)

    def _logits(self, epoch, description, keep):
        """The targets of `indices` alone, as they are kept."""
        path = self.path(epoch)
        if path.is_file():
            try:
                kept = load_arrays(path)
                logits = kept.get("logits")
                if kept.get("key") == self.key and logits is not None and logits.shape == self.shape:
                    return torch.from_numpy(logits).to(self.views.device)
                raise Damaged(f"{path} is damaged: its content does not match its name.")
            except Failure as error:
                tqdm.write(f"{error} These soft targets are computed again.", file=sys.stderr)
        logits = self._compute(epoch, description)
        keep = not self.shared if keep is None else keep
        if keep and self.has_room(self.bytes_per_epoch):
            try:
                make_folder(self.folder)
                save_arrays(path, key=self.key, logits=logits.cpu().numpy())
            except Failure as error:
                self._warn(str(error))
        return logits

    def _compute(self, epoch, description):
        batches = self.indices.split(inference_batch(self.machine.device, self.views.size))
        with tqdm(batches, desc=description, unit="batch", leave=False, disable=self.shared or None) as bar:
            views = (self.views.batch(epoch, indices) for indices in bar)
            return predict(self.teacher, views, self.machine.autocast(), compress)

    def has_room(self, size):
        """Whether the disk has room for `size` bytes of targets; warns once where it has not."""
        parent = next(parent for parent in [self.folder, *self.folder.parents] if parent.exists())
        free = shutil.disk_usage(parent).free
        if free > size + SPARE_DISK:
            return True
        self._warn(f"the disk of {self.folder} has {free / 1e6:.0f} MB left.")
        return False

    def _warn(self, why):
        if not self.warned:
            text = f"The soft targets are not kept: {why}\nEach student computes them again, which takes longer."
            tqdm.write(text, file=sys.stderr)
            self.warned = True

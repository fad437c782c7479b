"""--export: a network as one ONNX file that needs neither this program nor PyTorch, but only these lines:

    import json, numpy, onnxruntime
    from PIL import Image, ImageOps
    session = onnxruntime.InferenceSession("model.onnx")
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.fit(image, session.get_inputs()[0].shape[1:3])
    probabilities = session.run(None, {"images": numpy.asarray(image)[None]})[0][0]
    print(classes[probabilities.argmax()], probabilities.max())

They turn, resize and crop an image of 8 bits nearly as sources.decode.read_image does. How the model's training scaled
samples of more bits is in the file's metadata, too: "ranges", {kind: [black, white]}; and whether the answers are
averaged over an image and its mirror image: "mirror", true or false.
"""

import contextlib
import importlib.util
import io
import json
import warnings

import numpy as np
from tqdm import tqdm

from reports.records import find_test_images
from runs.files import Failure, first_line, write
from runs.hooks import find_hooks
from runs.settings import VERSION
from use.answers import answers, load_to_ask
from use.find import find_model

OPSET = 18  # of ONNX, from 2022: what PyTorch's exporter is written for, so that nothing is converted
TOLERANCE = 1e-4  # the largest difference in a probability; rounding alone makes about a millionth
NOISE = 256  # images of noise, where no test set is kept
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export(arguments):
    """Writes the model that `arguments` names as .onnx beside its .pt, once ONNX Runtime has answered on the test set
    as PyTorch does; prints the largest difference.

    Input `images`: uint8 (N, S, S, 3), any N, RGB. Output `probabilities`: float32 (N, classes). Raises Failure where
    packages are missing, PyTorch cannot export, the answers differ or the file cannot be written; nothing is then left.
    """
    path, hooks = find_model(arguments), find_hooks(arguments)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise Failure(f"--export needs {', '.join(missing)}: pip install -r requirements-export.txt")

    network = load_to_ask(path, hooks, arguments.mirror)  # and with it PyTorch, which takes seconds
    how = arguments.temperature[0], bool(arguments.mirror)
    content = to_onnx(network, *how)
    images = find_test_images(path, network.settings.get("data"))
    if images is None:
        shape = (NOISE, network.image_size, network.image_size, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        what = f"{len(images)} images of noise (no test set of this model is kept beside it)"
    else:
        what = f"{len(images):,} test images"
    difference, same = compare(network, content, images, *how)
    if not difference <= TOLERANCE:  # nor NaN
        raise Failure(
            f"ONNX Runtime does not answer as PyTorch does: on {what} probabilities differ by up to {difference:.2g}, "
            f"and the class is the same for {same:,}. Nothing was written. Try other versions of {', '.join(PACKAGES)}."
        )
    target = path.with_suffix(".onnx")
    write(target, content)
    averaged = ", averages over mirror images" if arguments.mirror else ""
    print(
        f"{target}: {len(content) / 1e6:.1f} MB, opset {OPSET}{averaged}\n"
        f"Compared with PyTorch on {what}: probabilities differ by at most {difference:.1e}, the class is the same for "
        f"{same:,} of {len(images):,}"
    )


def to_onnx(network, temperature=1.0, mirror=False):
    """A network from models.load as the bytes of an ONNX file, its logits divided by `temperature`, and with `mirror`
    averaged over each image and its mirror image. Raises Failure where PyTorch cannot export it."""
    import onnx
    import torch

    import models

    class Answer(torch.nn.Module):
        """uint8 images (N, S, S, 3) -> probabilities (N, classes)."""

        def __init__(self):
            super().__init__()
            self.network = network
            scale, shift = models.scale_and_shift(network.mean, network.std)
            self.register_buffer("scale", scale)
            self.register_buffer("shift", shift)

        def forward(self, images):
            views = (images.to(torch.float32) * self.scale + self.shift).permute(0, 3, 1, 2)
            if mirror:  # in one call: of two, exporters as old as PyTorch 2.11's make a file that is out of order
                views = torch.cat((views, views.flip(3)))
            logits = self.network(views)
            if mirror:
                logits = logits.view(2, images.shape[0], -1).mean(0)
            return (logits / temperature).softmax(1)

    size = network.image_size
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # onnxscript 0.6 prints there
            warnings.simplefilter("ignore")  # of the exporter about itself
            program = torch.onnx.export(
                Answer().eval(), (example,), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=["images"], output_names=["probabilities"],
                dynamic_shapes={"images": {0: torch.export.Dim("N")}},
            )  # fmt: skip
        proto = program.model_proto
        if [each.version for each in proto.opset_import if not each.domain] != [OPSET]:  # it only warns of this
            raise ValueError(f"the exporter gave opset {proto.opset_import[0].version}")
        onnx.helper.set_model_props(proto, _metadata(network, models.digest(network.state_dict()), temperature, mirror))
        onnx.checker.check_model(proto)
    except Exception as error:  # the exporter and its packages raise nearly every kind
        text = f"PyTorch {torch.__version__} cannot export to ONNX, opset {OPSET}: {first_line(error)}"
        if any(isinstance(each, ImportError | AttributeError) for each in (error, error.__cause__)):
            text += "\nonnx or onnxscript may be too old for this PyTorch: pip install -U -r requirements-export.txt"
        raise Failure(text) from error
    return proto.SerializeToString()


def _metadata(network, digest, temperature, mirror):
    """What the ONNX file says of itself, all of it text; `classes` and `ranges` are JSON, the classes in the order of
    the probabilities."""
    return {
        "classes": json.dumps(network.classes),
        "image_size": str(network.image_size),
        "ranges": json.dumps(network.ranges),
        "architecture": network.architecture,
        "accuracy": repr(network.accuracy),
        "temperature": repr(temperature),
        "mirror": json.dumps(mirror),
        "weights_sha256": digest,
        "program_version": VERSION,
    }


def compare(network, content, images, temperature=1.0, mirror=False):
    """(largest difference in a probability, number of images with the same class) between PyTorch and ONNX Runtime, for
    a network on the CPU, the bytes of an ONNX file that was made with the same `temperature` and `mirror`, and uint8
    images (N, S, S, 3)."""
    import onnxruntime
    import torch

    from models import inference_batch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        largest, same = 0.0, 0
        with tqdm(total=len(images), desc="comparing with PyTorch", unit=" images", disable=None) as bar:
            size = inference_batch(torch.device("cpu"), network.image_size)
            for start in range(0, len(images), size):
                batch = images[start : start + size]
                logits = answers(network, torch.from_numpy(batch), mirror)
                expected = (logits / temperature).softmax(1).numpy()
                found = session.run(["probabilities"], {"images": batch})[0]
                largest = float(np.maximum(largest, np.abs(found - expected).max()))  # keeps NaN
                same += int((found.argmax(1) == expected.argmax(1)).sum())
                bar.update(len(batch))
    except Exception as error:  # ONNX Runtime's own kinds, which have no base but Exception
        first = first_line(error)
        raise Failure(f"ONNX Runtime {onnxruntime.__version__} cannot run the model, opset {OPSET}: {first}") from error
    return largest, same

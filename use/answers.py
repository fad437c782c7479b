"""How a finished network is asked, by --predict and --export alike."""

from runs.files import Failure
from runs.settings import complete


def load_to_ask(path, hooks, mirror):
    """The network in a model.pt. Raises Failure where it is to be asked about mirror images (`mirror`), but was trained
    without them."""
    import models

    network = models.load(path, hooks=hooks)
    trained = network.settings.get("epochs")  # here, not elsewhere
    if mirror and trained and not complete(network.settings)["mirror"]:
        raise Failure(f"{path} was trained with --no-mirror, so it knows no mirror images. Leave out --mirror.")
    return network


def answers(network, images, mirror=False):
    """The float32 logits (N, classes) of uint8 images (N, S, S, 3); with `mirror` the mean of those of each image and
    of its mirror image."""
    from train import evaluate

    views = (images, images.flip(2)) if mirror else (images,)
    return sum(evaluate(network, each, network.mean, network.std) for each in views) / len(views)

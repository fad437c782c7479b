"""How a finished network is asked, by --predict and --export alike."""

from runs.files import Failure


def load(path, hooks, mirror):
    """models.load; raises Failure where `mirror` asks it about mirror images and it has never seen any."""
    import models

    network = models.load(path, hooks=hooks)
    if mirror and not network.settings.get("mirror", True):
        raise Failure(f"{path} was trained with --no-mirror, so it knows no mirror images. Leave out --mirror.")
    return network


def answers(network, images, mirror=False):
    """The float32 logits (N, classes) of uint8 images (N, S, S, 3); with `mirror` the mean of those of each image and
    of its mirror image."""
    from train import evaluate

    views = (images, images.flip(2)) if mirror else (images,)
    return sum(evaluate(network, each, network.mean, network.std) for each in views) / len(views)

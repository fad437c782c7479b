"""Muon: momentum whose step for a convolution is made orthogonal, so that every direction of its weights learns.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), in the form that the repository
cifar10-airbench uses for its speed-run: convolutions that batch norm follows keep their norm.
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from the source above
ITERATIONS = 3
CONVOLUTIONS = 0.15  # their learning rate, as a share of that of the head, biases and batch norm


def orthogonalise(matrix):
    """A matrix (rows, columns) brought near U V^T of its singular value decomposition U S V^T: directions stay,
    singular values above an eightieth of the norm come near 1 (0.5 to 1.2), smaller ones grow up to 41 times.

    Newton-Schulz iterations X <- (a + b X X^T + c (X X^T)^2) X. Their factors are polynomials of the first X X^T and
    commute, so they are multiplied with each other, small and square as they are, and with X only once. In bfloat16,
    in which Muon was published, the result is the same up to that type's rounding.
    """
    a, b, c = COEFFICIENTS
    transposed = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if transposed else matrix
    wide = wide / (wide.norm() + 1e-7)
    gram, product = wide @ wide.T, None
    for iteration in range(ITERATIONS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if iteration < ITERATIONS - 1:
            gram = factor @ gram @ factor
    step = product @ wide
    return step.T if transposed else step


class Muon(torch.optim.Optimizer):
    """For a network's convolutions: Nesterov momentum, made orthogonal (`orthogonalise`); before each step the weights
    (outputs, inputs, 3, 3) are brought to the Frobenius norm sqrt(outputs), which batch norm makes free to choose.
    For all else: SGD with Nesterov momentum, with weight decay on matrices.

    The learning rate of all groups is set to the schedule's; convolutions take CONVOLUTIONS of it. Steps are made
    orthogonal in `dtype`; weights and momenta stay float32.
    """

    def __init__(self, network, learning_rate, weight_decay, momentum, dtype=torch.float32):
        self.dtype = dtype
        parameters = list(network.parameters())
        groups = (
            {"params": [p for p in parameters if p.ndim == 4], "weight_decay": 0.0},
            {"params": [p for p in parameters if p.ndim == 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        )
        super().__init__(groups, {"lr": learning_rate, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters = group["params"]
            gradients = [p.grad for p in parameters]
            if group["weight_decay"]:
                gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            momenta = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, gradients)
            steps = torch._foreach_add(gradients, momenta, alpha=group["momentum"])
            if parameters[0].ndim < 4:
                torch._foreach_add_(parameters, steps, alpha=-group["lr"])
                continue
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
                step = orthogonalise(step.flatten(1).to(self.dtype)).view_as(parameter)
                parameter.add_(step, alpha=-group["lr"] * CONVOLUTIONS)

"""Trains the teacher of the digits settings on the 1,197 training images and writes it beside this file.

    python -m distillbench.suites.image_generation.train_digits_teacher

A class-conditional denoiser with EDM's preconditioning and loss (Karras et al. 2022, arXiv 2206.00364); one label in ten is left
out, so that it can be guided. Prints the denoising loss on the tune split (the test split is never read here) and the SHA-256
that the card pins. About four minutes on one core.
"""

from __future__ import annotations

import copy
import math

import torch

from distillbench.cards.options import options_of
from distillbench.files import write_atomic
from distillbench.identity import sha256
from distillbench.problems.image_generation.edm import denoising_loss, per_row
from distillbench.suites.image_generation import CARD
from distillbench.suites.image_generation.digits import TEACHER, Options, split
from distillbench.suites.image_generation.nets import build
from distillbench.training.nets import Architecture
from distillbench.training.student import Student

STEPS, BATCH, RATE, SEED = 4000, 256, 2e-3, 0
MEAN, STD = -0.6, 1.3  # of ln sigma
UNLABELLED, DROPOUT, AVERAGE = 0.1, 0.1, 0.999


def main() -> None:
    """Train, report, write."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    options = options_of(CARD.settings["digits"], Options)
    about = options.architecture
    net = build(Architecture(about.name, {**about.arguments, "dropout": DROPOUT}), SEED)
    average = build(about, SEED)
    mean = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, s / 100) * 0.5 * (1 + math.cos(math.pi * s / STEPS)))
    data, labels = split("train")

    def loss(images: torch.Tensor, classes: torch.Tensor | None, model: torch.nn.Module) -> torch.Tensor:
        sigma = (MEAN + STD * torch.randn(len(images))).exp().clamp(options.sigma_min, options.sigma_max)
        noisy = images + per_row(sigma, images) * torch.randn_like(images)
        return denoising_loss(model(noisy, sigma, classes), images, sigma, sigma_data=options.sigma_data).mean()

    for _ in range(STEPS):
        rows = torch.randint(len(data), (BATCH,))
        unlabelled = round(UNLABELLED * BATCH)
        value = loss(data[rows[unlabelled:]], labels[rows[unlabelled:]], net) * (1 - UNLABELLED)
        value = value + loss(data[rows[:unlabelled]], None, net) * UNLABELLED
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(mean.parameters()), list(net.parameters()), 1 - AVERAGE)
    average.load_state_dict(mean.state_dict())
    average.eval()
    with torch.no_grad():
        torch.manual_seed(SEED)
        tune, classes = (x.repeat(20, *[1] * (x.dim() - 1)) for x in split("tune"))
        held_out, seen = float(loss(tune, classes, average)), float(loss(data, labels, average))
    blob = Student.of(average).to_bytes()
    write_atomic(TEACHER, blob)
    size = sum(p.numel() for p in average.parameters())
    print(f"{TEACHER.name}: {size} parameters, loss {seen:.4f} train, {held_out:.4f} tune, sha256 {sha256(blob)}")


if __name__ == "__main__":
    main()

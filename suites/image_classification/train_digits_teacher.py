"""Trains the teacher of the digits settings on the 1,197 training labels and writes it beside this file.

    python -m distillbench.suites.image_classification.train_digits_teacher

Prints the accuracy on the tune split (the test split is never read here) and the SHA-256 that the card pins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distillbench.files import write_atomic
from distillbench.identity import sha256
from distillbench.suites.image_classification.digits import TEACHER, load, partition
from distillbench.suites.image_classification.nets import build
from distillbench.training.nets import Architecture
from distillbench.training.student import Student

EPOCHS, BATCH, SEED = 40, 64, 0


def main() -> None:
    """Train, report, write."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    images, labels = load()
    rows = partition()
    net = build(Architecture("small-cnn", {"widths": [32, 64, 74], "strides": [1, 2, 1], "outputs": 10}), SEED)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    steps = EPOCHS * (len(rows["train"]) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        order = rows["train"][torch.randperm(len(rows["train"]))]
        for batch in order.split(BATCH)[: len(order) // BATCH]:
            shift = [int(s) for s in torch.randint(-1, 2, (2,))]  # up to one pixel, the classic augmentation for digits
            loss = F.cross_entropy(net(torch.roll(images[batch], shift, (2, 3))), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        tune = (net(images[rows["tune"]]).argmax(1) == labels[rows["tune"]]).float().mean()
    blob = Student.of(net).to_bytes()
    write_atomic(TEACHER, blob)
    print(f"{TEACHER.name}: {sum(p.numel() for p in net.parameters())} parameters, tune accuracy {float(tune):.4f}, sha256 {sha256(blob)}")


if __name__ == "__main__":
    main()

"""DistiLLM's bookkeeping by plain loops: the threshold, the choice of text, the buffer."""


def thresholds(losses, phi, epsilon, compared):
    """phi after each validation. losses: the first is that of the start."""
    before, found = losses[0], []
    for loss in losses[1:]:
        if loss >= before + epsilon:
            phi, before = min(phi + 0.1, 1.0), loss
        elif compared == "best" and loss < before:
            before = loss
        found.append(phi)
    return found


def kinds(draws, phi, steps, batch, capacity, replay):
    """Of every step: "new", "old" or "given", for uniform draws and a fixed phi."""
    held, found = 0, []
    for step, u in enumerate(draws):
        share = {"decreasing": 1 - step / steps, "constant": 0.5, "increasing": step / steps, "off": 1.0}[replay]
        if u < phi * share or (u < phi and held < capacity):
            held = min(capacity, held + batch)
            found.append("new")
        else:
            found.append("old" if u < phi else "given")
    return found

"""Why was this digit misread? Influence on a convolutional network, and its wrong labels found.

A tenth of the training labels are changed at random before training. EK-FAC influence then answers
twice: a page shows, for test digits that the network misreads, the training digits that pulled it
there and those that held against; and training digits that influence their own loss most are
inspected for wrong labels.
Run: python examples/influence_digits.py
"""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import torch
import torch.nn.functional as F
from torch import nn

from curvlib.demo import digits
from curvlib.influence import Influence, mislabel_detection

SHOWN, EPOCHS = 8, 8

torch.set_num_threads(1)  # tensors are too small for more to help
draw = torch.Generator().manual_seed(0)
demo = digits(seed=0, epochs=0)  # an untrained network
model, (x, y), (images, labels) = demo.model, demo.train, demo.test

wrong = torch.rand(len(y), generator=draw) < 0.1
given = torch.where(wrong, (y + torch.randint(1, 10, y.shape, generator=draw)) % 10, y)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
model.train()
for _ in range(EPOCHS):
    for batch in torch.randperm(len(x), generator=draw).split(50):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), given[batch]).backward()
        optimizer.step()
model.eval()
model.zero_grad()
with torch.no_grad():
    predicted = model(images).argmax(1)
    losses = F.cross_entropy(model(x), given, reduction="none")
missed = (predicted != labels).nonzero()[:, 0]
print(
    f"{len(missed)} of {len(images)} test digits are misread, {int(wrong.sum())} labels are wrong"
)

influence = Influence(model, nn.CrossEntropyLoss(), (x, given), unit="nats")

# Wrong labels, by the influence of examples on themselves; the loss alone is a strong baseline.
own = influence.self_scores().scores
for name, scores in (("self-influence", own), ("loss", losses)):
    found = mislabel_detection(scores, wrong)
    shares = [
        f"{100 * share:.0f} % in the first {100 * at:.0f} %"
        for at, share in zip(found.inspected.tolist(), found.found.tolist(), strict=True)
    ]
    print(f"wrong labels found by {name}: {', '.join(shares)}; AUC {found.auc:.3f}")
ax = mislabel_detection(own, wrong).plot()
ax.set_title("Wrong labels, by self-influence", loc="left")

# Misread digits: what their wrong answer rests on is explained by its loss, with it as the label.
shown = missed[:SHOWN]
top = influence.top((images[shown], predicted[shown]), k=8)
liars = wrong[top.indices[:, :8]].float().mean()
print(
    f"of the eight strongest proponents of each wrong answer, {100 * liars:.0f} % have a wrong "
    f"label, of all training digits {100 * wrong.float().mean():.0f} %"
)

folder = Path("curvlib-out")
folder.mkdir(exist_ok=True)
ax.figure.savefig(folder / "influence_digits.png", dpi=200)
page = top.to_html(
    folder / "influence_digits.html",
    queries=images[shown],
    train=x,
    query_captions=[f"read as {int(predicted[i])}, is {int(labels[i])}" for i in shown],
    captions=lambda i: f"label {int(given[i])}" + (f" (wrong: {int(y[i])})" if wrong[i] else ""),
    title="Why were these digits misread?",
)
print(f"wrote {folder / 'influence_digits.png'} and {page}")

"""Detection by a small DETR-like model, pruned while it trains: `python detection.py [epochs]`. It draws its own images.

Queries meet the features of a timm backbone in a transformer; predictions are matched with the objects by the Hungarian method
(scipy). The loss is a dict. The heads stay dense.
"""

import sys

import lightning.pytorch as pl
import timm
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from lightning_cap import CAPPruningCallback
from lightning_cap.pruners import CAP

SIDE, QUERIES, CLASSES = 64, 6, 2  # classes: red and green boxes; one more is "nothing"


def draw(count, seed):
    """Images ``(n, 3, 64, 64)`` of two boxes on noise; the boxes ``(n, 2, 4)``, centre and size in [0, 1]; classes ``(n, 2)``."""
    generator = torch.Generator().manual_seed(seed)
    size = 0.15 + 0.2 * torch.rand(count, 2, 2, generator=generator)
    centre = size / 2 + (1 - size) * torch.rand(count, 2, 2, generator=generator)
    labels = torch.randint(CLASSES, (count, 2), generator=generator)
    images = 0.2 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    y, x = torch.meshgrid(*[(torch.arange(SIDE) + 0.5) / SIDE] * 2, indexing="ij")
    for k in range(2):
        at, half = centre[:, k, :, None, None], size[:, k, :, None, None] / 2
        inside = ((x - at[:, 0]).abs() < half[:, 0]) & ((y - at[:, 1]).abs() < half[:, 1])
        images += inside.unsqueeze(1) * nn.functional.one_hot(labels[:, k], 3)[:, :, None, None]
    return images, torch.cat([centre, size], -1), labels


class Detection(pl.LightningModule):
    def __init__(self, width=64) -> None:
        super().__init__()
        self.backbone = timm.create_model("resnet10t", pretrained=False, features_only=True, out_indices=(3,))
        self.neck = nn.Conv2d(self.backbone.feature_info.channels()[-1], width, 1)
        self.places = nn.Parameter(0.1 * torch.randn((SIDE // 16) ** 2, width))
        self.queries = nn.Parameter(torch.randn(QUERIES, width))
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(width, 4, 128, 0.0, batch_first=True) for _ in range(2))
        self.head_class, self.head_box = nn.Linear(width, CLASSES + 1), nn.Linear(width, 4)

    def forward(self, images):
        found = self.queries.expand(images.shape[0], -1, -1)  # len(images) would be a constant in ONNX
        features = self.neck(self.backbone(images)[0]).flatten(2).mT + self.places
        for layer in self.layers:
            found = layer(found, features)
        return self.head_class(found), self.head_box(found).sigmoid()

    @torch.no_grad()
    def match(self, logits, boxes, wanted, labels):
        """Query and object that belong together, of each image."""
        cost = torch.cdist(boxes, wanted, p=1) - logits.softmax(-1).gather(
            2, labels.unsqueeze(1).expand(-1, QUERIES, -1)
        )
        pairs = [torch.stack([torch.as_tensor(i) for i in linear_sum_assignment(one)]) for one in cost.cpu().numpy()]
        return torch.stack(pairs, 1).to(boxes.device).unbind()

    def losses(self, batch):
        images, wanted, labels = batch
        logits, boxes = self(images)
        query, thing = self.match(logits, boxes, wanted, labels)
        classes = torch.full(logits.shape[:2], CLASSES, device=logits.device).scatter(1, query, labels.gather(1, thing))
        boxes = boxes.gather(1, query.unsqueeze(-1).expand(-1, -1, 4)).flatten(0, 1)
        wanted = wanted.gather(1, thing.unsqueeze(-1).expand(-1, -1, 4)).flatten(0, 1)
        corners = [box_convert(b, "cxcywh", "xyxy") for b in (boxes, wanted)]
        weights = torch.tensor([1.0] * CLASSES + [0.2], device=logits.device)
        return {
            "class": nn.functional.cross_entropy(logits.flatten(0, 1), classes.flatten(), weights),
            "box": 5 * nn.functional.l1_loss(boxes, wanted),
            "overlap": 1 - generalized_box_iou(*corners).diagonal().mean(),
        }

    def training_step(self, batch, batch_idx):
        parts = self.losses(batch)
        return {"loss": sum(parts.values()), **{name: part.detach() for name, part in parts.items()}}

    def validation_step(self, batch, batch_idx):
        """Of the objects, those that the best matching query finds: the right class, and an overlap of a half."""
        images, wanted, labels = batch
        logits, boxes = self(images)
        query, thing = self.match(logits, boxes, wanted, labels)
        right = logits.argmax(-1).gather(1, query) == labels.gather(1, thing)
        for i in range(len(images)):
            overlap = box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (boxes[i, query[i]], wanted[i, thing[i]])))
            right[i] &= overlap.diagonal() > 0.5
        self.log("val_found", right.float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-4)


pl.seed_everything(0)
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
train, val = (DataLoader(TensorDataset(*draw(n, seed)), 32, shuffle=n > 128) for n, seed in ((1024, 1), (128, 2)))
pruner = CAP(block_size=64, num_gradients=256, samples_per_gradient=4)
cap = CAPPruningCallback({epochs // 2: 0.5, 3 * epochs // 4: 0.75}, pruner, exclude=["head_*"])
trainer = pl.Trainer(max_epochs=epochs, callbacks=[cap])
trainer.fit(Detection(), train, val)
print(f"{trainer.callback_metrics['val_found']:.1%} found with {cap.masks.global_sparsity:.1%} of the weights at zero")

"""Classification: logits out, compared by top-1."""

from training.models.classifier import CLASSIFY, adaptive_classifier, frozen_classifier
from training.models.vit import load_vit
from training.tasks.measure import TOP1
from training.tasks.task import Output, Task

CLASSIFICATION = Task(
    CLASSIFY,
    result=Output("logits", dtype="float32"),  # (B, classes)
    measure=TOP1,
    load=load_vit,
    freeze=frozen_classifier,
    freeze_adaptive=adaptive_classifier,
)

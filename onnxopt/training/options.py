"""The options that fine-tuning and distillation have in common: their names, types and defaults."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, TypeAlias, TypedDict, get_args

from onnxopt.contract import Progress

BatchNorm: TypeAlias = Literal["frozen", "batch", "restored"]
Device: TypeAlias = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = get_args(Device)

BATCHNORM: tuple[BatchNorm, ...] = get_args(BatchNorm)


class TrainingOptions(TypedDict, total=False):
    """Options of a training. Where defaults differ, the function says its own.

    Attributes:
        epochs: Passes over the samples, at most; 20.
        learning_rate: Of the last layer, at its highest; 1e-3. It rises at first and then falls along a cosine.
        batch: Samples per step; 32.
        weight_decay: Decay of matrices; 0.01.
        warmup: Share of the steps over which the learning rate rises; 0.1.
        layer_decay: Factor of the learning rate from a layer to the one before it; 1.
        clip: Largest norm of the gradient; 1.
        train: Patterns of the names of parameters that are trained; all by default.
        freeze: Patterns of those that are not.
        validation: Share of the samples that judge and are not learnt from; 0.2. 0 for none, and then the last epoch's
            state is kept.
        judging_folds: Folds that judge instead, each a model that was trained on the others; 0 for none. The result is
            then trained on all samples, to the last epoch.
        batchnorm: What BatchNormalization goes by. "frozen", the default: the statistics in the model, which
            it is run with later, and which a few samples would only make noisy. "batch": those of each batch; the
            running ones follow. "restored": besides, one is put behind each Conv and Gemm but the last, begins with
            the statistics of the samples so that nothing changes, and is folded into the layer at the end.
        batchnorm_behind: Patterns of the names of weights; "restored" is for their layers alone, the last included.
        patience: Epochs without a better state after which training ends; 5.
        shift: Pixels by which images move at random; 0.
        noise: Noise that is added to inputs, as a fraction of their standard deviation; 0.
        mix: Parameter of the beta distribution by which samples are mixed; 0, which mixes none.
        seed: The same seed gives the same result on the same machine; 0.
        threads: Threads of torch and of the runtime; 1.
        device: What torch computes on, "cpu" or "cuda"; the runtime, which judges, stays on the processor.
        checkpoint: File for the state after each epoch, in the safetensors format; training goes on from it.
        progress: Told what is being done.
    """

    epochs: int
    learning_rate: float
    batch: int
    weight_decay: float
    warmup: float
    layer_decay: float
    clip: float
    train: Sequence[str]
    freeze: Sequence[str]
    validation: float
    judging_folds: int
    batchnorm: BatchNorm
    batchnorm_behind: Sequence[str]
    patience: int
    shift: int
    noise: float
    mix: float
    seed: int
    threads: int
    device: Device
    checkpoint: str | os.PathLike[str] | None
    progress: Progress | None


DEFAULTS = TrainingOptions(
    epochs=20,
    learning_rate=1e-3,
    batch=32,
    weight_decay=0.01,
    warmup=0.1,
    layer_decay=1.0,
    clip=1.0,
    train=(),
    freeze=(),
    validation=0.2,
    judging_folds=0,
    batchnorm="frozen",
    batchnorm_behind=(),
    patience=5,
    shift=0,
    noise=0.0,
    mix=0.0,
    seed=0,
    threads=1,
    device="cpu",
    checkpoint=None,
    progress=None,
)

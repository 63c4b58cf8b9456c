"""Pretraining and quantization-aware fine-tuning of the network that a recipe describes.

Begin with :func:`qat.train.pretraining.pretrain` or :func:`qat.train.finetuning.finetune`. Then read
:mod:`qat.train.loop`, which both share, and :mod:`qat.train.job`, on which the loop works. ``capture``,
``state_file`` and ``resume`` save and resume interrupted runs, which end with the same bytes as others.
``parallel`` and ``sharding`` let several processes train one network.

It may import models, checkpoints, quantization, data, recipes and run directories, but not reports, the
exporter or commands.
"""

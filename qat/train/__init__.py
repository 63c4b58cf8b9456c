"""Pretraining and quantization-aware fine-tuning: a recipe becomes a run.

Begin to read at :func:`qat.train.pretraining.pretrain` or :func:`qat.train.finetuning.finetune`; then
:mod:`qat.train.loop`, which both share, and :mod:`qat.train.job`, which the loop works on. ``capture``,
``state_file`` and ``resume`` make an interrupted run end with the same bytes; ``parallel`` and ``sharding``
let several processes train one network.

It may import models, checkpoints, quantization, data, recipes and run directories, but neither reports, nor
the exporter, nor commands.
"""

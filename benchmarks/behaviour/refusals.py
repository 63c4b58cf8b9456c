"""The part of a record on bad input: messages and exit codes. It uses files that the other parts leave."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Final

from benchmarks.behaviour.commands import alike, qat
from benchmarks.behaviour.values import Values

#: Commands that refuse their input with a message.
REFUSED: Final = """
finetune --set schedule.epoch=5
finetune --set optimizer.lr=fast --set seed=-1
finetune --set quantization.se.weight_bit=4
finetune --set model.checkpoint=nowhere.safetensors
finetune --set model.checkpoint=damaged.safetensors --set model.widths=[8,8,16]
finetune --set model.checkpoint=float.safetensors
finetune --set quantization.exclude=[nothing.*]
finetune --set data.dataset=folder
finetune --recipe tiny_int
finetune --recipe tiny_digits_pretrain
finetune --resume finetune --recipe tiny_int8
finetune --resume nowhere
finetune --resume new
pretrain --recipe tiny_int8
pretrain --set model.widths=[8,12]
evaluate nowhere.onnx
evaluate text.onnx
evaluate text.safetensors
evaluate damaged.safetensors
export
export --onnx x.txt
export --onnx x.onnx --checkpoint float.safetensors
export --onnx x.onnx --run nowhere
export --onnx x.onnx --run finetune --float32 --target native
export --onnx x.onnx --run finetune --integer-network float.safetensors
verify portable.onnx --checkpoint float.safetensors
verify portable.onnx --integer-network float.safetensors
verify float32.onnx --run finetune
inspect text.safetensors
inspect damaged.safetensors
gate portable.onnx --baseline nowhere.json
gate portable.onnx --baseline text.safetensors
gate portable.onnx --baseline baseline.json --max-drop 200
gate portable.onnx --baseline baseline.json --floor 99.9
gate pixels.onnx --baseline baseline.json
gate record portable.onnx -o text.safetensors
report nowhere
report new
sensitivity --bits 9
sensitivity --recipe tiny_digits_pretrain
sensitivity --images 0 --set model.widths=[8,8,16] --set model.checkpoint=float.safetensors
recipe show tiny_int
bench nowhere.onnx
bench --targets fastest
"""


def refusals() -> Values:
    """Exit code and message of each command."""
    Path("text.safetensors").write_text("not a model", "utf-8")
    shutil.copy("text.safetensors", "text.onnx")
    content = bytearray(Path("float.safetensors").read_bytes())
    content[-len(content) // 3] ^= 0x40
    Path("damaged.safetensors").write_bytes(content)
    found: Values = {}
    for line in REFUSED.strip().splitlines():
        result = qat(*shlex.split(line))
        found[line] = f"{result.exit_code}: {alike(result.stderr)}"
    return found

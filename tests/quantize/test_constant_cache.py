"""Constants of an integer network are made once for an evaluation, and anew outside of one."""

from threading import Thread
from types import SimpleNamespace

import pytest
import torch

from qat.evaluation import collect_logits, predictor
from qat.models.bnext import BNext
from qat.quantize.constant_cache import integers_of, keeping_constants
from qat.recipe.schema import Data
from qat.system.launch import WHOLE
from tests.helpers.toy_networks import toy_images


class Module:
    made = 0

    def integers(self) -> int:
        self.made += 1
        return self.made


def test_only_inside_are_constants_held() -> None:
    one, other = Module(), Module()
    assert [integers_of(one), integers_of(one)] == [1, 2]
    with keeping_constants():
        assert [integers_of(one), integers_of(other), integers_of(one)] == [3, 1, 3]
        with keeping_constants():
            assert integers_of(one) == 4
        assert integers_of(one) == 3
    with pytest.raises(KeyError), keeping_constants():
        raise KeyError
    assert integers_of(one) == 5


def test_another_thread_does_not_know_of_it() -> None:
    module, found = Module(), []
    with keeping_constants():
        integers_of(module)
        thread = Thread(target=lambda: found.extend([integers_of(module), integers_of(module)]))
        thread.start()
        thread.join()
        assert integers_of(module) == 1
    assert found == [2, 3]


def test_an_evaluation_makes_them_once_and_the_next_one_anew(
    toy: BNext, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = next(module for module in toy.modules() if type(module).__name__ == "FakeQuantSubBlock")
    calls, made = [], type(block).integers
    monkeypatch.setattr(type(block), "integers", lambda self: calls.append(self) or made(self))
    predict = predictor(toy)
    predict.takes_pixels = True  # the images as they are
    batches = [(toy_images(2), torch.zeros(2))] * 3
    split = SimpleNamespace(batches=lambda size: batches, share=WHOLE)
    before = collect_logits(predict, split, Data())
    assert calls.count(block) == 1
    assert torch.equal(before[:2], before[4:])
    with torch.no_grad():
        block.norm1.bias.add_(1.0)
    assert not torch.equal(collect_logits(predict, split, Data()), before)
    assert calls.count(block) == 2

from typing import Any

from pruning import criteria
from pruning.architecture import Architecture, LayerShape
from pruning.memory import peak_bytes

LLAMA_7B = Architecture(4096, 32000, 128, False, False, False, False, False, (LayerShape(11008, 32, 1),) * 32)


def predicted(method: str = "llm_pruner", windows: tuple[int, int] = (10, 64), **options: Any) -> float:
    """As a multiple of the weights."""
    config = criteria.load(method).Config(ratio=0.2, **options)
    return peak_bytes(LLAMA_7B, 2, config, windows) / (2 * LLAMA_7B.parameters())


def test_the_prediction_follows_what_is_alive():
    assert LLAMA_7B.parameters() == 6_738_415_616  # counted in the paper's repository
    one_layer = 202_383_360 / 6_738_415_616  # its gradients, in the weights' own dtype
    assert 1 + one_layer < predicted() < 1.3
    assert predicted("magnitude", (0, 0)) < predicted("wanda") < predicted()
    assert predicted(windows=(100, 64)) > predicted()
    # A batch of many tokens keeps float32 sums of one layer's gradients; with curvature also their squares.
    assert predicted(taylor="param_mix") > predicted() + 2 * one_layer
    assert predicted("wanda", (128, 128), compensation="least_squares") > predicted("wanda", (128, 128))

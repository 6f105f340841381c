"""Layers of which only the hidden states go to the next, for stages that train layer by layer."""

from contextlib import AbstractContextManager

from torch import Tensor

from vqllm.calibration.layer_calls import States
from vqllm.calibration.layers import Layers
from vqllm.errors import ModelError


class HiddenLayers:
    """The layers of a stream, run on tensors.

    Attributes:
        names: full module name of each layer.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self.names = layers.names

    def ready(self, index: int) -> AbstractContextManager[object]:
        """Within, the layer can run."""
        return self._layers.ready(index)

    def run(
        self, index: int, tokens: Tensor, states: Tensor | None, *, grad: bool = False
    ) -> Tensor | None:
        """The hidden states [S, ..] that a layer gives, as `Layers.run` does.

        Raises:
            ModelError: later layers need more than hidden states.
        """
        given = None if states is None else States(states)
        output = self._layers.run(index, tokens, given, grad=grad)
        if output is None:
            return None
        if output.beside:
            raise ModelError(
                f"{self.names[index]} gives later layers more than its hidden states "
                f"({', '.join(sorted(output.beside))}), which a stage that trains layer by layer "
                "does not keep. Use a stage on the whole model, such as end_to_end."
            )
        return output.hidden

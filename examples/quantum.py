"""A quantum circuit with shots as a layer: PennyLane's simulator, read by 200 measurements of each qubit.

A linear layer sets eight angles, four qubits turn and are entangled twice, a linear layer reads their mean spins. These
are noisy, as on a real device. hzo measures how noisy, and plans steps and repeats for it: steps are long, since a
spin is a sine of an angle. PennyLane's own way for such circuits, the parameter shift, is a step of π/2.
"""

import numpy as np
import pennylane as qml
import torch
from torch import Tensor, nn

import hzo
from digits import compare, last_layer_only, options

QUBITS, LAYERS, SHOTS = 4, 2, 200
TARGET = 0.9  # expected cosine of the gradient in front of the circuit


def spins(angles: Tensor) -> list[qml.measurements.ExpectationMP]:
    """Of the qubits, for (samples, LAYERS * QUBITS) angles."""
    for layer in range(LAYERS):
        for qubit in range(QUBITS):
            qml.RY(angles[..., layer * QUBITS + qubit], wires=qubit)
        for qubit in range(QUBITS):
            qml.CNOT([qubit, (qubit + 1) % QUBITS])
    return [qml.expval(qml.PauliZ(qubit)) for qubit in range(QUBITS)]


circuit = qml.set_shots(qml.QNode(spins, qml.device("default.qubit", wires=QUBITS, seed=0)), shots=SHOTS)


def measured(angles: np.ndarray) -> np.ndarray:
    """(samples, angles) -> (samples, QUBITS): the mean spins of as many shots."""
    return np.stack(circuit(angles), 1)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layer = hzo.blackbox(measured, numpy=True, state=None, noise="measured", target_cosine=TARGET)
    return nn.Sequential(nn.Linear(64, LAYERS * QUBITS), layer, nn.Linear(QUBITS, 10))


def main() -> None:
    given = options(__doc__)
    models = {"hzo": network(given.seed), "last layer only": last_layer_only(network(given.seed))}
    compare(models, epochs=10, lr=2e-2, given=given)


if __name__ == "__main__":
    main()

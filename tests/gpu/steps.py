"""The steps of tests/gpu.sh, in their order. A further step is a row of STEPS and a function
`def name(context: Context) -> list[Row]` in a module of this folder."""

from dataclasses import dataclass


@dataclass
class Step:
    """A row of STEPS."""

    name: str
    # module:function, imported in the step's own process: what runs the steps holds no GPU
    function: str
    is_in_quick: bool
    # what it proves, for --help
    about: str


STEPS = (
    Step("machine", "gpu.machine:machine", True, "what this machine is and what it reaches"),
    Step(
        "parity",
        "gpu.parity:parity",
        True,
        "logits, gradients, low bits and answers beside transformers and the CPU",
    ),
    Step(
        "twenty",
        "gpu.twenty:twenty_steps",
        True,
        "20 steps of each stage beside the CPU's: losses, gradient norms, a plot",
    ),
)

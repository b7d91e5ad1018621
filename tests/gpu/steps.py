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
        "logits, gradients and low bits beside transformers' and the CPU's",
    ),
    Step("answers", "gpu.answers:answers", True, "a trained model's answers beside the CPU's"),
    Step(
        "twenty",
        "gpu.twenty:twenty_steps",
        True,
        "20 steps of each stage beside the CPU's: losses, gradient norms, a plot",
    ),
    Step(
        "resume",
        "gpu.resume:resume",
        False,
        "killed or stopped and started again: the run that never stopped; export = checkpoint",
    ),
    Step(
        "deterministic",
        "gpu.resume:deterministic",
        False,
        "the same with --deterministic: bit for bit",
    ),
    Step(
        "checkpoint",
        "gpu.checkpoint:checkpoint",
        False,
        "what a checkpoint that is written while training goes on costs",
    ),
    Step(
        "memory",
        "gpu.memory:memory",
        True,
        "peak memory beside the plan's: both stages, recomputing or not, LoRA on int8",
    ),
    Step(
        "out_of_memory",
        "gpu.memory:out_of_memory",
        True,
        "too large a micro-batch is answered in one line",
    ),
    Step("attention", "gpu.blocks:attention", True, "flash or cuDNN, and what a new length costs"),
    Step(
        "block_of_13b",
        "gpu.blocks:block_of_13b",
        True,
        "a block of 13B at its true size, and the hours of stage 2 on 8 of these",
    ),
    Step(
        "rank0_of_eight",
        "gpu.memory:rank0_of_eight",
        False,
        "the first of 8 GPUs that share the true 13B: its memory and its speed",
    ),
    Step(
        "speed",
        "gpu.speed:speed",
        False,
        "train.py's loop on a model that fills the GPU: MFU, its parts, what waits",
    ),
    Step(
        "low_bits",
        "gpu.inference:low_bit_products",
        True,
        "int8's and int4's products at 13B's sizes: each way right, and how fast",
    ),
    Step(
        "inference_bf16",
        "gpu.inference:inference_bf16",
        True,
        "13B writes: memory, prefill, tokens a second beside the bandwidth, captured or not",
    ),
    Step("inference_int8", "gpu.inference:inference_int8", True, "the same in 8 bits"),
    Step("inference_int4", "gpu.inference:inference_int4", True, "the same in 4 bits"),
    Step(
        "inference_compiled",
        "gpu.inference:inference_compiled",
        False,
        "--compile beside captured steps, in bf16",
    ),
    Step(
        "lora_step",
        "gpu.inference:lora_step",
        False,
        "a training step of adapters on 13B in 8 and in 4 bits",
    ),
    Step("serve", "gpu.commands:serve", False, "one question over HTTP beside sample.py's answer"),
    Step("smoke", "gpu.commands:smoke", False, "train.py --smoke, a row for each of its checks"),
)
